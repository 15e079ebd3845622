// Line icons on a 20 x 20 grid, drawn for this page.

const PATHS = {
  auto: ["M10 3.2a6.8 6.8 0 1 0 0 13.6z", "M10 3.2a6.8 6.8 0 0 1 0 13.6"],
  check: ["M4 10.5l4 4 8-9"],
  close: ["M5 5l10 10", "M15 5L5 15"],
  copy: ["M7.5 7.5h8v8.5h-8z", "M12.5 7.5V4h-8v8.5h3"],
  down: ["M10 4v12", "M5 11l5 5 5-5"],
  download: ["M10 3v9.5", "M6 9l4 4 4-4", "M4 16.5h12"],
  edit: ["M12.5 4.5l3 3L7 16H4v-3z", "M10.5 6.5l3 3"],
  menu: ["M3.5 6h13", "M3.5 10h13", "M3.5 14h13"],
  moon: ["M16 11.8A6.8 6.8 0 0 1 8.2 4a6.5 6.5 0 1 0 7.8 7.8z"],
  plus: ["M10 4v12", "M4 10h12"],
  redo: ["M15.8 8.5A6.2 6.2 0 1 0 16.2 11", "M16.3 4.5v4.2h-4.2"],
  send: ["M10 16V4.5", "M5 9l5-5 5 5"],
  sliders: ["M3.5 6.5h7", "M14.5 6.5h2", "M3.5 13.5h2", "M9.5 13.5h7", "M12.5 4.5v4", "M7.5 11.5v4"],
  stop: ["M6.5 6.5h7v7h-7z"],
  sun: [
    "M10 6.8a3.2 3.2 0 1 0 0 6.4 3.2 3.2 0 0 0 0-6.4z",
    "M10 2.8v1.2", "M10 16v1.2", "M2.8 10H4", "M16 10h1.2",
    "M4.9 4.9l.9.9", "M14.2 14.2l.9.9", "M4.9 15.1l.9-.9", "M14.2 5.8l.9-.9",
  ],
  tool: ["M12.9 3.6a3.9 3.9 0 0 0-4 5.3L3.6 14.2l2.2 2.2 5.3-5.3a3.9 3.9 0 0 0 5.3-4l-2.3 2.3-2.6-.6-.6-2.6z"],
  trash: ["M4 5.5h12", "M8 5.5V3.5h4v2", "M5.5 5.5l.8 11h7.4l.8-11"],
  upload: ["M10 13V3.5", "M6 7l4-4 4 4", "M4 16.5h12"],
  warn: ["M10 3.5l7 12.5H3z", "M10 8.5v3.5", "M10 14v.2"],
};
const SVG = "http://www.w3.org/2000/svg";

/** The icon as an SVG element; it says nothing to screen readers, its button has the name. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 20 20");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  for (const d of PATHS[name]) {
    const path = document.createElementNS(SVG, "path");
    path.setAttribute("d", d);
    svg.append(path);
  }
  return svg;
}

/** Exchanges the icon of a button. */
export function setIcon(button, name) {
  button.querySelector("svg.icon")?.remove();
  button.prepend(icon(name));
}
