// The frame around the conversation: drawers, theme, model line, toasts, scrolling, keys of the whole page.

import { byId, h, setLabel } from "./dom.js";
import { t } from "./i18n.js";
import { icon, setIcon } from "./icons.js";

const NARROW = matchMedia("(max-width: 860px)");
const NEAR = 80; // pixels from the end within which a growing answer keeps the view at its end

/** Wires what index.html holds; `actions` are functions without arguments, and importFile(input). */
export function start(actions) {
  for (const button of document.querySelectorAll("[data-icon]")) button.prepend(icon(button.dataset.icon));
  const clicks = {
    "new-chat": actions.newChat,
    "toggle-theme": actions.switchTheme,
    "toggle-language": actions.switchLanguage,
    "toggle-panel": () => (byId("panel").hidden ? actions.openPanel() : showPanel(false)),
    "open-sidebar": () => showSidebar(!sidebarShown()),
    "close-sidebar": () => showSidebar(false),
    "export-all": actions.exportAll,
    import: () => byId("import-file").click(),
    scrim: closeDrawers,
    "to-end": () => scrollToEnd(true),
  };
  for (const [id, action] of Object.entries(clicks)) byId(id).addEventListener("click", () => action());
  byId("import-file").addEventListener("change", (event) => actions.importFile(event.target));
  byId("scroller").addEventListener("scroll", showToEnd, { passive: true });
  document.addEventListener("keydown", (event) => pageKey(event, actions));
  NARROW.addEventListener("change", refreshDrawers);
  new ResizeObserver(measureBar).observe(byId("scroller"));
  refreshDrawers();
}

function pageKey(event, actions) {
  if (event.isComposing) return;
  const typing = /^(INPUT|TEXTAREA|SELECT)$/.test(document.activeElement?.tagName ?? "");
  if (event.key === "Escape") {
    if (!closeDrawers()) actions.stop();
  } else if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey && !event.altKey) actions.focusPrompt();
  else if ((event.ctrlKey || event.metaKey) && event.shiftKey && event.key.toLowerCase() === "o") actions.newChat();
  else return;
  event.preventDefault();
}

// --- drawers: beside the conversation on a wide screen, above it on a narrow one ---

const sidebarShown = () => (NARROW.matches ? document.body.classList.contains("sidebar-open") : !document.body.classList.contains("sidebar-folded"));

/** On a wide screen `false` leaves the list as it is, unless the user folds it. */
export function showSidebar(shown) {
  if (NARROW.matches) document.body.classList.toggle("sidebar-open", shown);
  else if (document.activeElement?.id === "open-sidebar") document.body.classList.toggle("sidebar-folded", !shown);
  refreshDrawers();
  if (shown && NARROW.matches) byId("close-sidebar").focus();
}

export function showPanel(shown) {
  byId("panel").hidden = !shown;
  byId("toggle-panel").setAttribute("aria-expanded", String(shown));
  refreshDrawers();
  if (!shown) byId("toggle-panel").focus();
}

// Escape closes what lies above the conversation; true if there was something.
function closeDrawers() {
  const panel = !byId("panel").hidden && (NARROW.matches || byId("panel").contains(document.activeElement));
  const sidebar = NARROW.matches && sidebarShown();
  if (panel) showPanel(false);
  if (sidebar) showSidebar(false);
  return panel || sidebar;
}

function refreshDrawers() {
  byId("sidebar").inert = !sidebarShown();
  byId("open-sidebar").setAttribute("aria-expanded", String(sidebarShown()));
  byId("scrim").hidden = !NARROW.matches || (byId("panel").hidden && !sidebarShown());
}

// The scroll bar takes its place on both sides of the conversation, so the message field gets as much.
function measureBar() {
  const { offsetWidth, clientWidth } = byId("scroller");
  document.documentElement.style.setProperty("--bar", `${(offsetWidth - clientWidth) / 2}px`);
}

// --- lines at the top ---

export function showTheme(theme) {
  document.documentElement.dataset.theme = theme;
  const button = byId("toggle-theme");
  setIcon(button, { auto: "auto", light: "sun", dark: "moon" }[theme]);
  setLabel(button, t("switchTheme", { now: t({ auto: "themeAuto", light: "themeLight", dark: "themeDark" }[theme]) }));
}

export function showModel({ server, settings }) {
  const words = { ready: "stateReady", loading: "stateLoading", offline: "stateOffline", key: "stateKey" };
  const box = byId("model-state");
  box.dataset.state = server;
  box.title = t(words[server]);
  byId("model-name").textContent = server === "ready" ? settings.model : t(words[server]);
}

// --- small things ---

/** A line at the bottom that goes by itself, with an action if there is one. */
export function toast(text, action = "", act = () => {}) {
  const element = h("div", { class: "toast" }, h("span", { text }));
  const close = () => element.remove();
  if (action) {
    const click = () => {
      close();
      act();
    };
    element.append(h("button", { type: "button", class: "text-button", text: action, on: { click } }));
  }
  byId("toasts").replaceChildren(element);
  setTimeout(close, 8000);
}

/** Calls `work` in the next frame, once, however often the returned function is called before. */
export function oncePerFrame(work) {
  let waiting = false;
  return () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      work();
    });
  };
}

let following = true; // the reader is at the end and wants to stay there

/** Goes to the end; without `always` only if the reader was there before the text grew. */
export function scrollToEnd(always) {
  const scroller = byId("scroller");
  if (always || following) scroller.scrollTop = scroller.scrollHeight;
  showToEnd();
}

function showToEnd() {
  const scroller = byId("scroller");
  following = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < NEAR;
  byId("to-end").hidden = following;
}
