// Markdown values as elements. Every text of the model ends in a text node, every address went through safeAddress.

import { highlight } from "./code.js";
import { copyText, h, setLabel } from "./dom.js";
import { t } from "./i18n.js";
import { setIcon } from "./icons.js";
import { parseInline } from "./inline.js";
import { parseBlocks } from "./markdown.js";

/** An element that shows a growing text: blocks that did not change keep their elements, so a selection in them stays. */
export class Prose {
  constructor() {
    this.element = h("div", { class: "prose" });
    this.sources = [];
  }

  update(text) {
    const blocks = parseBlocks(text);
    blocks.forEach((block, at) => {
      if (this.sources[at] === block.raw) return;
      const made = buildBlock(block);
      const old = this.element.children[at];
      if (old) old.replaceWith(made);
      else this.element.append(made);
      this.sources[at] = block.raw;
    });
    while (this.element.children.length > blocks.length) this.element.lastElementChild.remove();
    this.sources.length = blocks.length;
  }
}

const BUILDERS = {
  // The page's own headings are h1 and h2.
  heading: ({ level, text }) => h(`h${Math.min(6, level + 2)}`, { class: `size-${level}` }, inline(text)),
  paragraph: ({ text }) => h("p", {}, inline(text)),
  rule: () => h("hr"),
  quote: ({ blocks }) => h("blockquote", {}, blocks.map(buildBlock)),
  code: buildCode,
  list: buildList,
  table: buildTable,
};

const buildBlock = (block) => BUILDERS[block.type](block);
const inline = (text) => parseInline(text).map(buildInline);

function buildInline(node) {
  if (node.type === "text") return document.createTextNode(node.text);
  if (node.type === "break") return h("br");
  if (node.type === "code") return h("code", { text: node.text });
  const children = node.children.map(buildInline);
  if (node.type !== "link") return h(node.type, {}, children);
  return h("a", { href: node.href, target: "_blank", rel: "noopener noreferrer", title: node.href }, children);
}

function buildCode({ language, text }) {
  const copy = h("button", { type: "button", class: "icon-button small", icon: "copy", label: t("copyCode") });
  copy.addEventListener("click", async () => showCopied(copy, await copyText(text)));
  const pieces = highlight(text, language).map(([kind, piece]) => (kind ? h("span", { class: `hl-${kind}`, text: piece }) : piece));
  return h("figure", { class: "code" },
    h("figcaption", {}, h("span", { text: language.slice(0, 30) }), copy),
    h("pre", { tabindex: 0 }, h("code", {}, pieces)));
}

/** Shows for a moment that copying worked. */
export function showCopied(button, worked) {
  const before = button.getAttribute("aria-label");
  setIcon(button, worked ? "check" : "warn");
  setLabel(button, t(worked ? "copied" : "copyFailed"));
  setTimeout(() => {
    setIcon(button, "copy");
    setLabel(button, before);
  }, 1600);
}

function buildList({ ordered, start, items }) {
  const list = h(ordered ? "ol" : "ul", ordered && start !== 1 ? { start } : {});
  for (const { checked, blocks } of items) {
    const item = h("li", checked === null ? {} : { class: "task" });
    if (checked !== null) item.append(h("input", { type: "checkbox", disabled: true, checked, "aria-label": checked ? "☑" : "☐" }));
    for (const [at, block] of blocks.entries()) {
      // The first line of an item is no paragraph of its own: lists stay tight.
      if (block.type === "paragraph" && at === 0) item.append(...inline(block.text));
      else item.append(buildBlock(block));
    }
    list.append(item);
  }
  return list;
}

function buildTable({ head, aligns, rows }) {
  const row = (cells, tag) => h("tr", {}, cells.map((cell, at) => h(tag, { class: `align-${aligns[at]}` }, inline(cell))));
  return h("div", { class: "table", tabindex: 0 },
    h("table", {}, h("thead", {}, row(head, "th")), h("tbody", {}, rows.map((cells) => row(cells, "td")))));
}
