// Runs before the first paint, so that a dark page never flashes white and a Chinese one never shows English first.
(() => {
  let settings = {};
  try {
    settings = JSON.parse(localStorage.getItem("qwen-page.settings")) || {};
  } catch {
    // No storage, or not ours: the system's choices hold.
  }
  const root = document.documentElement;
  root.dataset.theme = ["light", "dark"].includes(settings.theme) ? settings.theme : "auto";
  const language = ["en", "zh"].includes(settings.language) ? settings.language : navigator.language;
  root.lang = /^zh/i.test(language) ? "zh-CN" : "en";
})();
