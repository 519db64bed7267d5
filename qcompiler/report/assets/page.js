"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);

  // The table: rows are in the page already, and are only hidden and moved.
  const table = document.getElementById("node-table");
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  const rows = [...body.rows].map((row) => ({ row, text: row.textContent.toLowerCase() }));
  const filter = document.getElementById("filter");
  const scheme = document.getElementById("scheme");
  const sort = document.getElementById("sort");
  let ascending = true;

  function show() {
    const wanted = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const { row, text } of rows) {
      const fits = wanted.every((word) => text.includes(word))
        && (!scheme.value || row.dataset.scheme === scheme.value);
      row.hidden = !fits;
      count += fits ? 1 : 0;
    }
    document.getElementById("shown").textContent = `${count} of ${rows.length}`;
  }

  function keyOf(row, column) {
    const cell = row.cells[column];
    if (!("sort" in cell.dataset)) return cell.classList.contains("n") ? null : cell.textContent;
    return Number(cell.dataset.sort);
  }

  function compare(one, other) {
    // What was not measured goes last, whichever way the order is.
    if (one === null || other === null) return (one === null) - (other === null);
    const order = typeof one === "number" ? one - other : one.localeCompare(other);
    return ascending ? order : -order;
  }

  function order() {
    const column = Number(sort.value);
    const sorted = rows.map(({ row }) => ({ row, key: keyOf(row, column) }));
    sorted.sort((one, other) => compare(one.key, other.key));
    body.append(...sorted.map(({ row }) => row));
    heads.forEach((head, index) => {
      if (index === column) head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
      else head.removeAttribute("aria-sort");
    });
  }

  filter.addEventListener("input", show);
  scheme.addEventListener("change", show);
  sort.addEventListener("change", () => { ascending = true; order(); });
  document.getElementById("turn").addEventListener("click", () => { ascending = !ascending; order(); });
  document.querySelector(".filters").addEventListener("submit", (event) => event.preventDefault());
  heads.forEach((head, index) => head.firstElementChild.addEventListener("click", () => {
    ascending = Number(sort.value) === index ? !ascending : true;
    sort.value = String(index);
    order();
  }));

  // The charts: drawn on canvas, so they are drawn again when colours or widths change.
  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const short = (value) => (value === null || value === undefined ? "" : Number(value.toPrecision(4)).toString());

  function axis(label, more) {
    return { stroke: color("--quiet"), grid: { stroke: color("--line"), width: 1 }, ticks: { stroke: color("--line"), width: 1 }, label, labelSize: 22, ...more };
  }

  // Counted things have no halves.
  const counted = { incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000] };

  function line(label, stroke, more) {
    return { label, stroke: color(stroke), width: 1.5, value: (_, value) => short(value), ...more };
  }

  function numbers(values) {
    return values.map((_, index) => index + 1);
  }

  // A logarithmic axis has no place for zero.
  function positive(values) {
    return values.map((value) => (value > 0 ? value : null));
  }

  const charts = {
    growth() {
      const { names, result, data: read, weight } = data.growth;
      const series = [{ label: "node", value: (_, value) => names[value - 1] ?? "" }];
      const columns = [numbers(names)];
      for (const [label, values, stroke, more] of [
        ["result dB", result, "--accent", { points: { show: names.length < 80, fill: color("--panel") } }],
        ["data dB", read, "--second", { dash: [4, 4], points: { show: false } }],
        ["weight dB", weight, "--quiet", { paths: () => null, points: { show: true, size: 5, fill: color("--panel") } }],
      ]) {
        if (values.some((value) => value !== null)) {
          series.push(line(label, stroke, { spanGaps: true, ...more }));
          columns.push(values);
        }
      }
      return [{ series, scales: { x: { time: false } }, axes: [axis("ops by depth", counted), axis("SQNR, dB")] }, columns];
    },
    channels(index) {
      const profile = data.channels[index];
      const dashed = { dash: [4, 4] };
      return [{
        series: [
          { label: "channel", value: (_, value) => short(value) },
          line("data before", "--accent", dashed), line("data", "--accent"),
          line("weight before", "--second", dashed), line("weight", "--second"),
        ],
        scales: { x: { time: false }, y: { distr: 3 } },
        axes: [axis("", counted), axis("magnitude")],
      }, [numbers(profile.data_before), ...["data_before", "data_after", "weight_before", "weight_after"].map((name) => positive(profile[name]))]];
    },
    windows() {
      const { names, before, after } = data.windows;
      return [{
        series: [{ label: "window", value: (_, value) => names[value - 1] ?? "" }, line("before", "--second"), line("after", "--accent")],
        scales: { x: { time: false }, y: { distr: 3 } },
        axes: [axis("window", counted), axis("loss")],
      }, [numbers(names), positive(before), positive(after)]];
    },
    search() {
      const { label, names, bits, logarithmic, latency } = data.search;
      const shown = logarithmic ? positive : (values) => values;
      const dots = (size) => ({ paths: () => null, points: { show: true, size } });
      const series = [
        { label: "candidate", value: (_, __, ___, index) => names[index] ?? "" },
        line(label, "--accent", { ...dots(6), points: { show: true, size: 6, fill: color("--panel") } }),
        line("none smaller as good", "--accent", { spanGaps: true, points: { show: false } }),
        line("chosen", "--accent", dots(11)),
      ];
      const axes = [axis("bits per weight"), axis(label, { values: (_, ticks) => ticks.map(short) })];
      const columns = [bits, ...["accuracy", "front", "chosen"].map((name) => shown(data.search[name]))];
      if (latency.some((value) => value !== null)) {
        series.push(line("latency", "--second", { scale: "ratio", ...dots(5) }));
        axes.push(axis("latency, of float's", { scale: "ratio", side: 1, grid: { show: false } }));
        columns.push(latency);
      }
      return [{ series, scales: { x: { time: false }, y: { distr: logarithmic ? 3 : 1 } }, axes }, columns];
    },
  };

  const drawn = new Map();

  function draw(place) {
    const [options, columns] = charts[place.dataset.chart](Number(place.dataset.index ?? 0));
    drawn.get(place)?.destroy();
    const height = place.classList.contains("small") ? 220 : 300;
    drawn.set(place, new uPlot({ width: Math.max(place.clientWidth, 200), height, ...options }, columns, place));
  }

  const places = [...document.querySelectorAll(".chart")];
  places.forEach(draw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => places.forEach(draw));
  let width = document.documentElement.clientWidth;
  addEventListener("resize", () => {
    if (document.documentElement.clientWidth === width) return;
    width = document.documentElement.clientWidth;
    places.forEach((place) => drawn.get(place).setSize({ width: Math.max(place.clientWidth, 200), height: drawn.get(place).height }));
  });
})();
