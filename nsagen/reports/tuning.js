// Draws a search's plots when it is first opened; the style sheet has the colours of text and lines.
function draw(section) {
  for (const place of section.querySelectorAll(".plot:empty")) {
    const figure = JSON.parse(place.nextElementSibling.textContent);
    Plotly.react(place, figure.data, figure.layout, { responsive: true, displayModeBar: false });
  }
}

for (const section of document.querySelectorAll("details")) {
  section.addEventListener("toggle", () => section.open && draw(section));
  if (section.open) draw(section);
}
