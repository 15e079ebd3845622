// Building blocks of the page. Text always becomes text nodes: nothing here parses HTML.

import { icon } from "./icons.js";

/**
 * An element. `props`: `class`, `text`, `icon`, `label` (accessible name and tooltip), `on` (event handlers),
 * `data` (data-* values); anything else is an attribute (true: present, false or null: absent).
 */
export function h(tag, props = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (name === "class") element.className = value;
    else if (name === "text") element.append(value);
    else if (name === "icon") element.prepend(icon(value));
    else if (name === "label") setLabel(element, value);
    else if (name === "on") addListeners(element, value);
    else if (name === "data") Object.assign(element.dataset, value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, String(value));
  }
  element.append(...children.flat().filter((child) => child != null && child !== false));
  return element;
}

/** A button with an icon and no text, named for screen readers and on hover. */
export function iconButton(name, label, click, extra = {}) {
  return h("button", { type: "button", class: "icon-button", icon: name, label, on: { click }, ...extra });
}

/** Accessible name and tooltip in one. */
export function setLabel(element, text) {
  element.setAttribute("aria-label", text);
  element.title = text;
}

export const byId = (id) => document.getElementById(id);

/** Lets a text field be as high as its text; the style sheet sets the limit. */
export function fitHeight(area) {
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight}px`;
}

/** Puts text on the clipboard, also where the page has no secure origin (http in a local network). */
export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = h("textarea", { class: "unseen", "aria-hidden": "true" });
    area.value = text;
    document.body.append(area);
    area.select();
    const copied = document.execCommand("copy");
    area.remove();
    return copied;
  }
}

/** Hands the text to the browser as a file. */
export function download(name, text) {
  const address = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  h("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}

function addListeners(element, handlers) {
  for (const [event, handler] of Object.entries(handlers)) element.addEventListener(event, handler);
}
