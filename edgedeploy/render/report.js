// Makes the drawings of a report interactive. The page says everything without it: where scripts are blocked, or anything
// here is missing, the drawings stay as they are.
(() => {
  "use strict";

  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const dark = window.matchMedia("(prefers-color-scheme: dark)");

  // ------------------------------------------------------------ visits: a tip that pointer, finger and keys bring up

  const tip = document.createElement("div");
  tip.className = "tip";
  tip.setAttribute("role", "status");
  tip.hidden = true;
  document.body.append(tip);
  let seen = null;
  let seenTop = 0;

  const hide = () => {
    tip.hidden = true;
    if (seen) seen.classList.remove("seen");
    seen = null;
  };

  const show = (visit, x, y) => {
    if (seen !== visit) {
      hide();
      seen = visit;
      visit.classList.add("seen");
      // Words of devices and files: text, never markup.
      tip.replaceChildren(
        ...visit.dataset.words.split("\n").map((line) => {
          const row = document.createElement("div");
          row.textContent = line;
          return row;
        }),
      );
      tip.hidden = false;
    }
    seenTop = visit.getBoundingClientRect().top;
    const room = 8;
    const box = tip.getBoundingClientRect();
    const width = document.documentElement.clientWidth;
    const left = x + 14 + box.width > width - room ? x - 14 - box.width : x + 14;
    tip.style.left = `${Math.max(room, Math.min(left, width - box.width - room))}px`;
    const above = y - box.height - 14;
    tip.style.top = `${above < room ? y + 18 : above}px`;
  };

  const showAtItsPlace = (visit) => {
    visit.scrollIntoView({ block: "nearest", inline: "nearest" });
    const box = visit.querySelector(".hit").getBoundingClientRect();
    show(visit, box.right, box.top + 20);
  };

  for (const drawing of document.querySelectorAll("svg.visits")) {
    const visits = [...drawing.querySelectorAll("g.visit")];
    for (const visit of visits) {
      const title = visit.querySelector("title");
      visit.dataset.words = title.textContent;
      title.remove(); // or the browser shows its own tip beside ours
    }
    const over = (event) => {
      const visit = event.target.closest("g.visit");
      if (visit) show(visit, event.clientX, event.clientY);
      else hide();
    };
    drawing.addEventListener("pointermove", over);
    drawing.addEventListener("pointerdown", over);
    drawing.addEventListener("pointerleave", (event) => {
      if (event.pointerType === "mouse") hide();
    });
    drawing.setAttribute("tabindex", "0");
    drawing.addEventListener("blur", hide);
    drawing.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (event.key === "Escape") hide();
      if (!step) return;
      event.preventDefault();
      const place = visits.indexOf(seen);
      const next = place < 0 ? (step > 0 ? 0 : visits.length - 1) : place + step;
      if (visits[next]) showAtItsPlace(visits[next]);
    });
  }
  document.addEventListener("scroll", () => {
    // Told late: a page that was moved to bring a visit into sight stands where it stood when its tip was shown.
    if (seen && Math.abs(seen.getBoundingClientRect().top - seenTop) > 2) hide();
  });

  // ------------------------------------------------------------ charts: values under the pointer, drag to enlarge

  const held = document.getElementById("report-data");
  if (!held || typeof uPlot === "undefined") return;

  const printed = (value, unit) => (value === null || value === undefined ? "–" : `${+value.toPrecision(4)} ${unit}`.trim());
  const percent = (share) => (share === null || share === undefined ? "–" : `${+(share * 100).toPrecision(4)} %`);
  const since = (seconds) => {
    if (seconds === null || seconds === undefined) return "–";
    return seconds < 600 ? `${+seconds.toPrecision(3)} s` : `${+(seconds / 60).toPrecision(3)} min`;
  };

  const axis = (values, size) => ({
    stroke: color("--soft"),
    grid: { stroke: color("--line"), width: 1 },
    ticks: { stroke: color("--line"), width: 1 },
    font: "11px system-ui, sans-serif",
    space: size > 40 ? 30 : 70,
    size,
    values: (_, splits) => splits.map(values),
  });

  const sides = (chart, value) => {
    const known = ["baseline", "candidate"].filter((side) => chart[side].length);
    return {
      columns: known.map((side) => chart[side]),
      series: known.map((side) => ({
        label: side,
        stroke: color(`--${side}`),
        width: 2,
        dash: side === "baseline" ? [7, 3] : undefined,
        spanGaps: true,
        points: { show: false },
        value: (_, shown) => value(shown),
      })),
    };
  };

  const live = (host, title, height, spec) => {
    const place = document.createElement("div");
    place.className = "live";
    place.setAttribute("role", "img");
    place.setAttribute("aria-label", title);
    let plot = null;
    const make = () => {
      if (!host.clientWidth) return; // folded away: it is made when there is room for it
      if (plot) plot.destroy();
      const { options, columns } = spec();
      plot = new uPlot({ width: host.clientWidth, height, ...options }, columns, place);
      host.append(place);
      host.classList.add("enhanced");
    };
    new ResizeObserver(() => {
      if (!plot) make();
      else if (host.clientWidth && plot.width !== host.clientWidth) plot.setSize({ width: host.clientWidth, height });
    }).observe(host);
    dark.addEventListener("change", make);
  };

  for (const cell of JSON.parse(held.textContent).cells) {
    const hosts = (kind) => [...document.querySelectorAll(`#${cell.cell} [data-chart="${kind}"]`)];
    const [shown] = hosts("distribution");
    if (shown && cell.distribution) {
      const chart = cell.distribution;
      live(shown, "Distribution of inference times", 260, () => {
        const { columns, series } = sides(chart, percent);
        return {
          columns: [chart.x, ...columns],
          options: {
            scales: { x: { time: false }, y: { range: [0, 1] } },
            axes: [axis((value) => printed(value, chart.unit), 34), axis(percent, 52)],
            series: [{ label: "no longer than", value: (_, value) => printed(value, chart.unit) }, ...series],
          },
        };
      });
    }
    hosts("panel").forEach((host, number) => {
      const chart = cell.panels[number];
      if (!chart) return;
      live(host, chart.title, 150, () => {
        const { columns, series } = sides(chart, (value) => printed(value, chart.unit));
        return {
          columns: [chart.x, ...columns],
          options: {
            cursor: { sync: { key: cell.cell } },
            hooks: {
              // Six legends that say nothing are six too many.
              init: [(plot) => plot.root.classList.add("quiet")],
              setCursor: [(plot) => plot.root.classList.toggle("quiet", plot.cursor.idx === null)],
            },
            scales: { x: { time: false } },
            axes: [axis(since, 30), axis((value) => printed(value, chart.unit), 64)],
            series: [{ label: "since the start", value: (_, value) => since(value) }, ...series],
          },
        };
      });
    });
  }
})();
