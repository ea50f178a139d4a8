// Light, dark, or as the system is; remembered where the browser lets it be.

const KEPT = "podwall-theme";

function show(theme) {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  for (const button of document.querySelectorAll("#theme button"))
    button.setAttribute("aria-pressed", String(button.dataset.theme === theme));
}

document.getElementById("theme").addEventListener("click", (event) => {
  const theme = event.target.dataset.theme;
  if (!theme) return;
  localStorage.setItem(KEPT, theme);
  show(theme);
});

show(localStorage.getItem(KEPT) ?? "auto");
