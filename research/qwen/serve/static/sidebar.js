// The list of chats: open, rename in place, export, delete.

import { byId, h, iconButton } from "./dom.js";
import { t } from "./i18n.js";

const DAY = 86_400_000;

/** `actions`: open(id), rename(id, title), exportOne(id), remove(id). */
export class Sidebar {
  constructor(actions) {
    Object.assign(this, { actions, renaming: "", chats: [], current: "" });
    this.list = byId("chat-list");
    this.list.addEventListener("keydown", (event) => this.arrows(event));
  }

  show(chats, current) {
    Object.assign(this, { chats, current });
    const groups = [];
    for (const chat of chats) {
      const name = groupOf(chat.updated);
      if (groups.at(-1)?.name !== name) groups.push({ name, items: [] });
      groups.at(-1).items.push(this.item(chat));
    }
    const empty = h("p", { class: "hint", text: t("noChats") });
    this.list.replaceChildren(...(groups.length ? groups.map(section) : [empty]));
    const field = this.list.querySelector("input");
    field?.focus();
    field?.select();
  }

  item(chat) {
    const title = chat.title || t("untitled");
    if (chat.id === this.renaming) return h("li", { class: "chat-item" }, this.renameField(chat));
    const current = chat.id === this.current;
    return h("li", { class: current ? "chat-item current" : "chat-item" },
      h("button", {
        type: "button", class: "chat-open", text: title, title, "aria-current": current ? "page" : null,
        on: { click: () => this.actions.open(chat.id), dblclick: () => this.rename(chat.id) },
      }),
      h("span", { class: "chat-tools" },
        iconButton("edit", t("rename", { title }), () => this.rename(chat.id)),
        iconButton("download", t("exportOne", { title }), () => this.actions.exportOne(chat.id)),
        iconButton("trash", t("remove", { title }), () => this.actions.remove(chat.id))));
  }

  rename(id) {
    this.renaming = id;
    this.show(this.chats, this.current);
  }

  renameField(chat) {
    const field = h("input", { class: "field", value: chat.title, maxlength: 120, "aria-label": t("renameField") });
    const end = (keep) => {
      if (this.renaming !== chat.id) return;
      this.renaming = "";
      if (keep && field.value.trim()) this.actions.rename(chat.id, field.value.trim());
      else this.show(this.chats, this.current);
    };
    field.addEventListener("blur", () => end(true));
    field.addEventListener("keydown", (event) => {
      if (event.isComposing) return;
      if (event.key === "Enter") end(true);
      if (event.key === "Escape") {
        event.stopPropagation();
        end(false);
      }
    });
    return field;
  }

  // Up and down go from chat to chat; F2 and Delete do what they do in a list of files.
  arrows(event) {
    const buttons = [...this.list.querySelectorAll(".chat-open")];
    const at = buttons.indexOf(document.activeElement);
    if (at < 0) return;
    const id = this.chats[at].id;
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (step) buttons[(at + step + buttons.length) % buttons.length].focus();
    else if (event.key === "F2") this.rename(id);
    else if (event.key === "Delete") this.actions.remove(id);
    else return;
    event.preventDefault();
  }
}

const section = ({ name, items }) => h("section", {}, h("h2", { text: t(name) }), h("ul", {}, items));

function groupOf(time) {
  const midnight = new Date().setHours(0, 0, 0, 0);
  if (time >= midnight) return "today";
  return time >= midnight - 6 * DAY ? "week" : "older";
}
