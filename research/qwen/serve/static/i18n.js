// The language of the page: texts by key, and the marked elements of index.html.

import { setLabel } from "./dom.js";
import { STRINGS } from "./strings.js";

let language = "en";

export const currentLanguage = () => language;

/** The text of a key in the present language, with {values} filled in. */
export function t(key, values = {}) {
  return STRINGS[language][key].replace(/\{(\w+)\}/g, (whole, name) => (name in values ? String(values[name]) : whole));
}

/** Switches the language and rewrites every marked element below the document. */
export function setLanguage(name) {
  language = name === "zh" ? "zh" : "en";
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  for (const element of document.querySelectorAll("[data-i18n]")) element.textContent = t(element.dataset.i18n);
  for (const element of document.querySelectorAll("[data-i18n-label]")) {
    if (element.tagName === "ASIDE" || element.tagName === "NAV") element.setAttribute("aria-label", t(element.dataset.i18nLabel));
    else if (element.dataset.i18nLabel !== "switchTheme") setLabel(element, t(element.dataset.i18nLabel));
  }
  for (const element of document.querySelectorAll("[data-i18n-placeholder]")) {
    element.placeholder = t(element.dataset.i18nPlaceholder);
  }
}
