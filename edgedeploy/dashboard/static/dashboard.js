// Says of a plot's dots what they are, by pointer, finger and arrow keys. Without it their titles and the table say so.
"use strict";
for (const figure of document.querySelectorAll("figure.plot")) {
  const svg = figure.querySelector("svg");
  const tip = figure.querySelector(".tip");
  const dots = [...svg.querySelectorAll("circle.run")].map((dot) => ({
    x: Number(dot.getAttribute("cx")), y: Number(dot.getAttribute("cy")), dot, text: dot.querySelector("title").textContent,
  }));
  if (!dots.length) continue;
  // The browser's own tip would come up beside ours.
  for (const one of dots) one.dot.querySelector("title").remove();
  let shown = -1;
  // On a narrow window the drawing is scrolled, and the newest runs are what one came for.
  const frame = figure.querySelector(".scroll");
  frame.scrollLeft = frame.scrollWidth;

  const hide = () => {
    if (shown >= 0) dots[shown].dot.classList.remove("pointed");
    shown = -1;
    tip.hidden = true;
  };
  const show = (index) => {
    hide();
    shown = index;
    const { x, y, dot, text } = dots[index];
    dot.classList.add("pointed");
    tip.replaceChildren(...text.split("; ").map((line) => {
      const one = document.createElement("div");
      one.textContent = line;
      return one;
    }));
    tip.hidden = false;
    const place = new DOMPoint(x, y).matrixTransform(svg.getScreenCTM());
    const around = figure.getBoundingClientRect();
    const left = Math.min(Math.max(place.x - around.left + 14, 0), around.width - tip.offsetWidth);
    const isBelow = place.y - around.top < tip.offsetHeight + 20;
    tip.style.left = `${left}px`;
    tip.style.top = `${place.y - around.top + (isBelow ? 16 : -tip.offsetHeight - 12)}px`;
  };
  const nearest = (x) => {
    let low = 0, high = dots.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (dots[middle].x < x) low = middle; else high = middle;
    }
    return Math.abs(dots[low].x - x) <= Math.abs(dots[high].x - x) ? low : high;
  };
  const point = (event) => {
    show(nearest(new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse()).x));
  };
  svg.addEventListener("pointermove", point);
  svg.addEventListener("pointerdown", point);
  svg.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") hide(); });
  figure.addEventListener("focusout", hide);
  figure.addEventListener("keydown", (event) => {
    const last = dots.length - 1;
    const steps = { ArrowLeft: shown < 0 ? last : shown - 1, ArrowRight: shown < 0 ? last : shown + 1, Home: 0, End: last };
    if (event.key === "Escape") hide();
    if (!(event.key in steps)) return;
    event.preventDefault();
    show(Math.min(Math.max(steps[event.key], 0), last));
  });
}
