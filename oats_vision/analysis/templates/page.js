// Tables that sort, and the spectrum of the layer that is chosen.
for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[0].cells], first = [...table.tBodies[0].rows];
  const key = (row, column) => {
    const text = row.cells[column].dataset.value, number = Number(text);
    return text === "" ? -Infinity : Number.isNaN(number) ? text : number;
  };
  headings.forEach((heading, column) => heading.firstElementChild.addEventListener("click", () => {
    const up = heading.getAttribute("aria-sort") !== "ascending";
    const rows = [...first].sort((a, b) => {
      const p = key(a, column), q = key(b, column);
      return (p < q ? -1 : p > q ? 1 : 0) * (up ? 1 : -1);
    });
    headings.forEach(other => other.removeAttribute("aria-sort"));
    heading.setAttribute("aria-sort", up ? "ascending" : "descending");
    table.tBodies[0].append(...rows);
  }));
}

const data = document.getElementById("spectra");
if (data) {
  const spectra = JSON.parse(data.textContent);
  const svg = document.getElementById("spectrum"), choice = document.getElementById("layer");
  const draw = () => {
    const {rank, values} = spectra[choice.selectedIndex];
    const all = Object.values(values).flat().filter(value => value > 0);
    const width = Math.max(svg.clientWidth, 280), height = 320, left = 52, base = height - 44;
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.innerHTML = "";
    if (!all.length) return;
    const top = Math.log10(Math.max(...all)), bottom = Math.max(Math.log10(Math.min(...all)), top - 4);
    const last = rank[rank.length - 1];
    const x = r => left + (width - left - 8) * (r - 1) / Math.max(last - 1, 1);
    const y = v => 12 + (base - 12) * (top - Math.max(Math.log10(v), bottom)) / Math.max(top - bottom, 1e-6);
    const text = (at, up, anchor, words) =>
      `<text x="${at}" y="${up}" text-anchor="${anchor}" font-size="12" style="fill:var(--muted)">${words}</text>`;
    let body = "";
    for (let e = Math.floor(bottom); e <= top; e++) for (const m of top - bottom < 2 ? [1, 2, 5] : [1]) {
      const v = m * 10 ** e;
      if (v < 10 ** bottom || v > 10 ** top) continue;
      body += text(left - 8, y(v) + 4, "end", Number(v.toPrecision(1)));
      body += `<line x1="${left}" x2="${width - 8}" y1="${y(v)}" y2="${y(v)}" style="stroke:var(--line)"/>`;
    }
    body += `<line x1="${left}" x2="${width - 8}" y1="${base}" y2="${base}" style="stroke:var(--line)"/>`;
    body += text(left, base + 18, "start", 1) + text(width - 8, base + 18, "end", last);
    body += text((left + width) / 2, base + 36, "middle", "number of the singular value");
    for (const [term, colour] of [["whole", "currentColor"], ["sparse", "var(--s1)"], ["low_rank", "var(--s2)"]]) {
      if (!values[term]) continue;
      const points = rank.map((r, i) => [r, values[term][i]]).filter(p => p[1] > 0);
      const line = points.map(p => `${x(p[0]).toFixed(1)},${y(p[1]).toFixed(1)}`).join(" ");
      body += `<polyline data-term="${term}" fill="none" stroke-width="2" style="stroke:${colour}" points="${line}"/>`;
    }
    svg.innerHTML = body;
  };
  choice.addEventListener("change", draw);
  addEventListener("resize", draw);
  draw();
}
