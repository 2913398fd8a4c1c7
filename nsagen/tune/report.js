// Draws a search's plots when it is first opened, in the page's own colours.
function colours() {
  const style = getComputedStyle(document.documentElement);
  const ink = style.getPropertyValue("--ink").trim(), line = style.getPropertyValue("--line").trim();
  return { ink, line };
}

function inPageColours(layout) {
  const { ink, line } = colours(), clear = "rgba(0,0,0,0)";
  const dressed = { ...layout, paper_bgcolor: clear, plot_bgcolor: clear, font: { color: ink } };
  for (const key of ["xaxis", "yaxis", ...Object.keys(layout)]) {
    if (/^[xy]axis\d*$/.test(key)) {
      dressed[key] = { ...layout[key], gridcolor: line, zerolinecolor: line, linecolor: line };
    }
  }
  return dressed;
}

function draw(section) {
  for (const place of section.querySelectorAll(".plot")) {
    const figure = JSON.parse(place.nextElementSibling.textContent);
    Plotly.react(place, figure.data, inPageColours(figure.layout), { responsive: true });
  }
}

for (const section of document.querySelectorAll("details")) {
  section.addEventListener("toggle", () => section.open && draw(section));
  if (section.open) draw(section);
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  document.querySelectorAll("details[open]").forEach(draw);
});
