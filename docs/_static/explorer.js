// The margin explorer. Its curves are those that the losses themselves wrote at each degree; nothing
// here knows a margin's formula. A page may have a part of the plots and controls; one with a link to
// the whole explorer keeps its settings there, and not in its own address.
"use strict";
(() => {
  const data = window.marginExplorerData;
  const root = document.getElementById("explorer");
  if (!data || !root) return;

  const PI = Math.PI;
  const CLASSES = [2, 5, 10, 20, 50, 100, 200, 500, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 2e5, 5e5, 1e6];
  const START = { s: 64, C: 1000, other: 90, angle: 30 }; // angles in degrees, as the grid has them
  const LOSSES = new Map(data.losses.map((loss, number) => [loss.id, { ...loss, number }]));
  const element = (id) => document.getElementById(`explorer-${id}`);
  const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
  const both = (radians) => `${radians.toFixed(3)} rad (${((radians * 180) / PI).toFixed(1)}°)`;
  const atDegree = (degrees) => `${((degrees * PI) / 180).toFixed(3)} rad (${degrees}°)`;
  const line = (loss) => `class="line c${loss.number % 6} d${Math.floor(loss.number / 6)}"`;
  const swatch = (loss) =>
    `<svg class="swatch" viewBox="0 0 36 10" aria-hidden="true"><path ${line(loss)} d="M1,5H35"/></svg>`;

  // ---- the numbers -------------------------------------------------------------------------------

  const curves = data.curves.map((text) => {
    const bytes = atob(text);
    const byte = (i) => bytes.charCodeAt(i);
    return Float64Array.from({ length: bytes.length / 3 }, (_, i) => {
      const bits = (byte(3 * i) << 8) | (byte(3 * i + 1) << 16) | (byte(3 * i + 2) << 24);
      return (bits >> 8) * data.unit;
    });
  });

  function nearest(values, wanted) {
    const distance = (i) => Math.abs(values[i] - wanted);
    return values.reduce((best, _, i) => (distance(i) < distance(best) ? i : best), 0);
  }

  // A loss with its slider at a place: its curves, and what they make of an angle (a degree).
  function curvesOf(loss, place) {
    const [psi, slope, eta] = [loss.psi, loss.slope, loss.eta].map((numbers) => curves[numbers[place]]);
    return { loss, place, psi, slope, eta };
  }

  function values({ psi, slope, eta }, degree, { s, C, other }) {
    return {
      psi: psi[degree],
      logit: s * psi[degree],
      gradient: s * slope[degree],
      probability: 1 / (1 + (C - 1) * Math.exp(s * (eta[other] - psi[degree]))),
    };
  }

  // How far from its centre a class reaches in the direction at `azimuth` to the other centre: the
  // first angle at which psi falls below what the other class makes of the angle to its own centre.
  function reach({ psi, eta }, other, azimuth) {
    const [near, far] = [Math.cos(other), Math.sin(other) * Math.cos(azimuth)];
    let before = 0;
    for (let degree = 0; degree <= 180; degree++) {
      const theta = (degree * PI) / 180;
      const cosine = clamp(near * Math.cos(theta) + far * Math.sin(theta), -1, 1);
      const place = (Math.acos(cosine) * 180) / PI;
      const low = Math.min(Math.floor(place), 179);
      const lead = psi[degree] - eta[low] - (place - low) * (eta[low + 1] - eta[low]);
      if (lead < -1e-9) return degree ? ((degree - 1 + before / (before - lead)) * PI) / 180 : 0;
      before = Math.max(lead, 0);
    }
    return PI;
  }

  window.marginExplorer = {
    // Angles in radians; m and the angles are taken to the nearest of the grid.
    value(id, m, theta, s, C, other = PI / 2) {
      const loss = LOSSES.get(id);
      const [degree, away] = [theta, other].map((angle) => Math.round((angle * 180) / PI));
      return values(curvesOf(loss, nearest(loss.values, m)), degree, { s, C, other: away });
    },
  };

  // ---- the settings, and the address that keeps them ---------------------------------------------

  const atStart = () => ({
    ...START,
    places: new Map(data.losses.map(({ id, start }) => [id, start])),
    shown: new Set(data.losses.filter(({ shown }) => shown).map(({ id }) => id)),
  });
  let state = atStart();
  const shown = () =>
    [...LOSSES.values()].filter(({ id }) => state.shown.has(id)).map((loss) => curvesOf(loss, state.places.get(loss.id)));

  function toFragment() {
    const losses = shown().map(({ loss, place }) => (loss.symbol ? `${loss.id}:${loss.values[place]}` : loss.id));
    return `#losses=${losses.join(",")}&s=${state.s}&C=${state.C}&other=${state.other}&theta=${state.angle}`;
  }

  // What a link says; what it does not say, or says wrongly, is as at the start.
  function fromFragment(fragment) {
    const found = new URLSearchParams(fragment.slice(1));
    const number = (name, start, low, high) => {
      const given = Number.parseFloat(found.get(name));
      return Number.isFinite(given) ? Math.round(clamp(given, low, high)) : start;
    };
    state = atStart();
    state.s = number("s", START.s, 1, 256);
    state.C = CLASSES[nearest(CLASSES, number("C", START.C, 2, 1e6))];
    state.other = number("other", START.other, 10, 170);
    state.angle = number("theta", START.angle, 0, 180);
    if (!found.has("losses")) return;
    state.shown.clear();
    for (const [id, value] of found.get("losses").split(",").map((text) => text.split(":"))) {
      const loss = LOSSES.get(id);
      if (!loss) continue;
      state.shown.add(id);
      if (Number.isFinite(Number.parseFloat(value))) state.places.set(id, nearest(loss.values, Number.parseFloat(value)));
    }
  }

  let timer;
  const link = element("link");
  function keep() {
    if (link) link.hash = toFragment();
    else history.replaceState(null, "", toFragment());
  }
  function keepSoon() {
    clearTimeout(timer); // browsers count changes of the address, and refuse too many
    timer = setTimeout(keep, 200);
  }

  // ---- the three curves --------------------------------------------------------------------------

  const QUANTITIES = ["logit", "gradient", "probability"];
  const PLOTS = QUANTITIES.filter(element);
  const BOX = { left: 46, right: 348, top: 10, bottom: 212 };
  const across = (degree) => BOX.left + ((BOX.right - BOX.left) * degree) / 180;
  const spans = {}; // the lowest and highest value of each plot

  function ticks(low, high) {
    const least = (high - low || 1) / 6;
    const power = 10 ** Math.floor(Math.log10(least));
    const step = power * [1, 2, 5, 10].find((k) => k * power >= least * 0.999);
    const first = Math.floor(low / step + 1e-9);
    const last = Math.max(Math.ceil(high / step - 1e-9), first + 1);
    const decimals = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
    return Array.from({ length: last - first + 1 }, (_, i) => ((first + i) * step).toFixed(decimals));
  }

  const up = (name, value) => {
    const [low, high] = spans[name];
    return BOX.bottom - ((BOX.bottom - BOX.top) * (value - low)) / (high - low);
  };

  function drawCurves(name) {
    const all = shown().map((found) => ({
      ...found,
      values: Array.from(found.psi, (_, degree) => values(found, degree, state)[name]),
    }));
    const flat = name === "probability" ? [0, 1] : all.flatMap((one) => one.values);
    const marks = ticks(Math.min(0, ...flat), Math.max(0, ...flat));
    spans[name] = [Number(marks[0]), Number(marks.at(-1))];
    const angles = [["0", 0], ["π/4", 45], ["π/2", 90], ["3π/4", 135], ["π", 180]];
    element(`${name}-drawing`).innerHTML = [
      ...marks.map((mark) => {
        const y = up(name, Number(mark)).toFixed(1);
        return `<path class="grid" d="M${BOX.left},${y}H${BOX.right}"/><text class="end" x="${BOX.left - 6}" y="${y}" dy="4">${mark}</text>`;
      }),
      ...angles.map(([text, degree]) => {
        const x = across(degree);
        const place = degree === 180 ? "end" : "middle";
        return `<path class="grid" d="M${x},${BOX.top}V${BOX.bottom}"/><text class="${place}" x="${x}" y="228">${text}</text><text class="${place} small" x="${x}" y="243">${degree}°</text>`;
      }),
      ...all.map(({ loss, values: of }) => {
        const points = of.map((value, degree) => `${across(degree).toFixed(1)},${up(name, value).toFixed(1)}`);
        return `<path ${line(loss)} data-loss="${loss.id}" d="M${points.join("L")}"/>`;
      }),
    ].join("");
  }

  // ---- the boundary, on a circle and on a sphere -------------------------------------------------

  const RADIUS = 112;
  const onCircle = (radius, angle) => `${(radius * Math.sin(angle)).toFixed(2)},${(-radius * Math.cos(angle)).toFixed(2)}`;

  function drawCircle(all, other) {
    const centre = -other / 2; // from the top; that of the second class is its mirror image
    const marks = [centre, -centre].map((angle, i) => {
      const [x, y] = onCircle(RADIUS + 12, angle).split(",");
      return `<path class="ray" d="M0,0L${onCircle(RADIUS, angle)}"/><text class="middle" x="${x}" y="${y}" dy="4">w${"₁₂"[i]}</text>`;
    });
    const step = Math.min(11, 80 / all.length);
    const arcs = all.flatMap((one, ring) => {
      const [front, back] = [reach(one, other, 0), reach(one, other, PI)];
      if (front + back === 0) return [];
      const radius = RADIUS - 6 - step * ring;
      const large = front + back > PI ? 1 : 0;
      return [1, -1].map((side) => {
        const [from, to] = [side * (centre - back), side * (centre + front)].map((angle) => onCircle(radius, angle));
        return `<path ${line(one.loss)} d="M${from}A${radius},${radius} 0 ${large} ${side > 0 ? 1 : 0} ${to}"/>`;
      });
    });
    element("circle-drawing").innerHTML = `<circle class="ball" r="${RADIUS}"/>${marks.join("")}${arcs.join("")}`;
  }

  // The sphere from in front of the middle between the centres and a little above, parallel rays.
  const [TILT_COS, TILT_SIN] = [Math.cos(0.4), Math.sin(0.4)];
  const seen = ([x, y, z]) => [x * RADIUS, (z * TILT_SIN - y * TILT_COS) * RADIUS, z * TILT_COS + y * TILT_SIN];

  function drawSphere(all, other) {
    const [sine, cosine] = [Math.sin(other / 2), Math.cos(other / 2)];
    const ways = Array.from({ length: 120 }, (_, i) => ((i - 60) * PI) / 60);
    const centre = [-sine, 0, cosine]; // of the first class; the second is its mirror image
    // The part of a class that is seen: its edge, or where the sphere turns away before that.
    const outline = (reaches) =>
      ways.map((azimuth, i) => {
        const [along, aside] = [Math.cos(azimuth), Math.sin(azimuth)];
        const way = [along * cosine, aside, along * sine]; // the tangent at the centre
        const [limb, edge] = [Math.atan2(seen(centre)[2], -seen(way)[2]), reaches[Math.abs(i - 60)]];
        const r = Math.min(edge, limb);
        const [x, y] = seen(centre.map((c, axis) => c * Math.cos(r) + way[axis] * Math.sin(r)));
        return { x, y, isEdge: edge < limb };
      });
    const at = ({ x, y }, side) => `${(side * x).toFixed(1)},${y.toFixed(1)}`;
    const caps = all.flatMap((one) => {
      const reaches = Array.from({ length: 61 }, (_, i) => reach(one, other, (i * PI) / 60));
      if (reaches[0] + reaches[60] === 0) return [];
      const points = outline(reaches);
      return [1, -1].flatMap((side) => {
        const places = points.map((point) => at(point, side));
        // The walk ends where it began; it is drawn where the edge is in sight.
        const walk = [...places, places[0]].map((place, i) => {
          const ends = [points[(i + 119) % 120], points[i % 120]];
          return (i && ends.every(({ isEdge }) => isEdge) ? "L" : "M") + place;
        });
        return [
          `<path class="cap c${one.loss.number % 6}" d="M${places.join("L")}Z"/>`,
          `<path ${line(one.loss)} d="${walk.join("")}"/>`,
        ];
      });
    });
    const equator = ways.map((angle) => seen([Math.sin(angle), 0, Math.cos(angle)])).filter((point) => point[2] >= 0);
    const [x, y] = seen(centre);
    const dots = [x, -x].map(
      (place, i) => `<circle class="dot" cx="${place}" cy="${y}" r="3"/><text class="middle" x="${place}" y="${y - 9}">w${"₁₂"[i]}</text>`,
    );
    element("sphere-drawing").innerHTML =
      `<circle class="ball" r="${RADIUS}"/><path class="ray" d="M${equator.map(([x, y]) => at({ x, y }, 1)).join("L")}"/>${caps.join("")}${dots.join("")}`;
  }

  // ---- the page ----------------------------------------------------------------------------------

  const named = ({ loss, place }) => {
    const value = loss.values[place];
    if (!loss.symbol) return "no margin";
    return `${loss.symbol} = ${value}${loss.isAngle ? ` rad (${((value * 180) / PI).toFixed(1)}°)` : ""}`;
  };
  const PRINTED = {
    logit: (value) => value.toFixed(2),
    gradient: (value) => value.toFixed(2),
    probability: (value) => (value < 0.001 ? value.toExponential(2) : value.toFixed(3)),
  };

  function drawReadout(all) {
    element("angle").textContent = `At θ = ${atDegree(state.angle)}`;
    element("rows").innerHTML = all
      .map((one) => {
        const front = reach(one, (state.other * PI) / 180, 0);
        const cells = QUANTITIES.map((name) => `<td data-quantity="${name}">${PRINTED[name](one.now[name])}</td>`);
        return `<tr data-loss="${one.loss.id}"><th scope="row">${swatch(one.loss)} ${one.loss.label}<br><small>${named(one)}</small></th>${cells.join("")}<td data-quantity="boundary">${front ? both(front) : "none"}</td></tr>`;
      })
      .join("");
  }

  // What depends on the angle: the readout, the marks on the curves, and what the plots say.
  function drawAngle() {
    const all = shown().map((found) => ({ ...found, now: values(found, state.angle, state) }));
    if (element("rows")) drawReadout(all);
    for (const name of PLOTS) {
      const x = across(state.angle);
      const dots = all.map(({ loss, now }) => `<circle class="c${loss.number % 6}" cx="${x}" cy="${up(name, now[name]).toFixed(1)}" r="3.5"/>`);
      element(`${name}-cursor`).innerHTML = `<path class="cursor" d="M${x},${BOX.top}V${BOX.bottom}"/>${dots.join("")}`;
      const spoken = all.map(({ loss, now }) => `${loss.label} ${PRINTED[name](now[name])}`);
      element(name).setAttribute("aria-valuenow", state.angle);
      element(name).setAttribute("aria-valuetext", [atDegree(state.angle), ...spoken].join("; "));
    }
  }

  function set(input, value, text) {
    if (!input) return;
    input.value = value;
    input.setAttribute("aria-valuetext", text);
    element(`${input.name}-value`).textContent = text;
  }

  function draw() {
    set(element("s"), state.s, `${state.s}`);
    set(element("C"), CLASSES.indexOf(state.C), state.C.toLocaleString("en"));
    set(element("other"), state.other, atDegree(state.other));
    for (const loss of LOSSES.values()) {
      const place = state.places.get(loss.id);
      element(`show-${loss.id}`).checked = state.shown.has(loss.id);
      if (!loss.symbol) continue;
      element(`setting-${loss.id}`).hidden = !state.shown.has(loss.id);
      set(element(loss.id), place, named({ loss, place }));
    }
    PLOTS.forEach(drawCurves);
    const [all, other] = [shown(), (state.other * PI) / 180];
    const boundaries = all.map((one) => `${one.loss.label}, ${named(one)}: ${both(reach(one, other, 0))}`);
    for (const [name, drawShape] of Object.entries({ circle: drawCircle, sphere: drawSphere })) {
      if (!element(`${name}-drawing`)) continue;
      drawShape(all, other);
      element(`${name}-text`).textContent = `Where the boundary is on the way from one centre to the other. ${boundaries.join("; ")}.`;
    }
    drawAngle();
  }

  function turn(degrees) {
    state.angle = clamp(Math.round(degrees), 0, 180);
    drawAngle();
    keepSoon();
  }

  function listen() {
    const form = element("controls");
    form.addEventListener("input", ({ target }) => {
      if (target.type === "checkbox") state.shown[target.checked ? "add" : "delete"](target.value);
      else if (target.name === "C") state.C = CLASSES[target.value];
      else if (LOSSES.has(target.name)) state.places.set(target.name, Number(target.value));
      else state[target.name] = Number(target.value);
      draw();
      keepSoon();
    });
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("reset", (event) => {
      event.preventDefault();
      state = atStart();
      draw();
      keepSoon();
    });
    element("copy")?.addEventListener("click", async () => {
      clearTimeout(timer);
      keep();
      const copied = await navigator.clipboard?.writeText(location.href).then(() => true, () => false);
      element("said").textContent = copied ? "Link copied." : "The address bar has the link.";
    });
    window.addEventListener("hashchange", ({ newURL }) => {
      const { hash } = new URL(newURL);
      if (link || !hash.includes("=")) return; // a heading of this page
      clearTimeout(timer);
      fromFragment(hash);
      draw();
    });
    const steps = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1, PageDown: -10, PageUp: 10, Home: -180, End: 180 };
    for (const name of PLOTS) {
      const plot = element(name);
      plot.addEventListener("keydown", (event) => {
        if (!(event.key in steps) || event.altKey || event.ctrlKey || event.metaKey) return;
        event.preventDefault();
        turn(state.angle + steps[event.key]);
      });
      const point = ({ clientX }) => {
        const { left, width } = plot.getBoundingClientRect();
        const x = ((clientX - left) / width) * 360; // in units of the view box
        turn(((x - BOX.left) / (BOX.right - BOX.left)) * 180);
      };
      plot.addEventListener("pointermove", point);
      plot.addEventListener("pointerdown", point);
    }
  }

  element("losses").innerHTML = [...LOSSES.values()]
    .map((loss) => {
      const setting = `<div class="setting" id="explorer-setting-${loss.id}"><input type="range" id="explorer-${loss.id}" name="${loss.id}" min="0" max="${loss.values.length - 1}" aria-label="${loss.symbol} of ${loss.label}"><output id="explorer-${loss.id}-value" for="explorer-${loss.id}"></output></div>`;
      return `<li><label><input type="checkbox" id="explorer-show-${loss.id}" value="${loss.id}"> ${swatch(loss)} ${loss.label}</label>${loss.symbol ? setting : ""}</li>`;
    })
    .join("");
  if (!link && location.hash.includes("=")) fromFragment(location.hash);
  listen();
  element("static").hidden = true;
  root.hidden = false;
  draw();
})();
