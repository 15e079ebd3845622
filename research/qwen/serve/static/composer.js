// The message field with its two buttons.

import { byId, fitHeight } from "./dom.js";

/** `actions`: send(text), stop(). */
export class Composer {
  constructor(actions) {
    this.actions = actions;
    this.area = byId("prompt");
    this.area.addEventListener("input", () => this.refresh());
    this.area.addEventListener("keydown", (event) => this.key(event));
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.submit();
    });
    byId("stop").addEventListener("click", () => {
      actions.stop();
      this.focus();
    });
  }

  // While an input method composes Chinese, Enter belongs to it (Safari reports the last one as key 229).
  key(event) {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
    event.preventDefault();
    this.submit();
  }

  submit() {
    if (!this.running && this.area.value.trim()) this.actions.send(this.area.value);
  }

  show(running) {
    this.running = running;
    byId("stop").hidden = !running;
    byId("send").hidden = running;
    this.refresh();
  }

  clear() {
    this.area.value = "";
    this.refresh();
  }

  refresh() {
    fitHeight(this.area);
    byId("send").disabled = !this.area.value.trim();
  }

  // On a phone the focus would push up the keyboard unasked.
  focus() {
    if (matchMedia("(hover: hover)").matches) this.area.focus();
  }
}
