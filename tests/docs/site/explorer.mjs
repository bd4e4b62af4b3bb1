// The margin explorer in a browser: its values are the library's, and it works by hand, key and link.
import assert from "node:assert/strict";

const PLOTS = ["logit", "gradient", "probability"];
const NAMES = [...PLOTS, "circle", "sphere"];

// Throws where the page fails. `expected` is what tests/docs/site/explorer.py makes of the losses.
export async function check(page, address, expected) {
  const url = new URL("explorer.html", address).href;
  await page.goto(url);
  await valuesAreTheLibrarys(page, url, expected);
  await slidersChangeThePlots(page, url);
  await keysAndPointerTurn(page, url);
  await aLinkRestores(page, url);
  await fitsAPhone(page, url);
  await standsWithoutScript(page, url, address);
}

// A link to other settings; the page is there already. theta has to differ from the last.
async function follow(page, url, settings) {
  await page.goto(`${url}#${settings}`);
  await page.waitForSelector(`#explorer-logit[aria-valuenow="${new URLSearchParams(settings).get("theta")}"]`);
}

const drawing = (page, name) => page.locator(`#explorer-${name}-drawing`).innerHTML();
const drawings = async (page) => Object.fromEntries(await Promise.all(NAMES.map(async (name) => [name, await drawing(page, name)])));
const readout = (page) => page.locator("#explorer-rows").innerText();

function close(found, wanted, tolerance, what) {
  assert.ok(Math.abs(found - wanted) <= tolerance, `${what}: expected ${wanted}, the page has ${found}`);
}

async function valuesAreTheLibrarys(page, url, expected) {
  assert.ok(expected.length > 100, "too few values to compare with");
  for (const row of expected) {
    const what = `${row.loss} at ${row.value}, ${row.theta} degrees`;
    const stored = 0.51e-5 * row.s; // of a logit, by the rounding of the data
    const radians = (degrees) => (degrees * Math.PI) / 180;
    const found = await page.evaluate(
      (given) => window.marginExplorer.value(...given),
      [row.loss, row.value, radians(row.theta), row.s, row.C, radians(row.other)],
    );
    close(found.logit, row.logit, stored, `${what}, logit`);
    close(found.gradient, row.gradient, stored, `${what}, gradient`);
    close(found.probability, row.probability, 2.1 * stored * row.probability, `${what}, p`);

    await follow(page, url, `losses=${row.loss}:${row.value}&s=${row.s}&C=${row.C}&other=${row.other}&theta=${row.theta}`);
    const shown = await page.evaluate(() =>
      Object.fromEntries([...document.querySelectorAll("#explorer-rows td")].map((cell) => [cell.dataset.quantity, cell.innerText])),
    );
    close(Number(shown.logit), row.logit, 0.005 + stored, `${what}, printed logit`);
    close(Number(shown.gradient), row.gradient, 0.005 + stored, `${what}, printed gradient`);
    const printed = row.probability < 0.001 ? 0.006 * row.probability : 0.00051;
    close(Number(shown.probability), row.probability, printed + 2.1 * stored * row.probability, `${what}, printed p`);
    const edge = shown.boundary === "none" ? 0 : Number.parseFloat(shown.boundary);
    close(edge, row.boundary, 0.002, `${what}, boundary`);
  }
}

async function slidersChangeThePlots(page, url) {
  const changes = {
    "explorer-arcface": NAMES,
    "explorer-s": PLOTS,
    "explorer-C": ["probability"],
    "explorer-other": ["probability", "circle", "sphere"],
  };
  for (const [number, [id, names]] of Object.entries(changes).entries()) {
    await follow(page, url, `losses=arcface:0.5&s=20&C=1000&other=90&theta=${60 + number}`);
    const [before, rows] = [await drawings(page), await readout(page)];
    await page.locator(`#${id}`).focus();
    for (let i = 0; i < 3; i++) await page.keyboard.press("ArrowRight");
    const after = await drawings(page);
    for (const name of NAMES)
      assert.equal(before[name] !== after[name], names.includes(name), `${id}: the ${name} plot changes where it should not, or does not`);
    assert.notEqual(await readout(page), rows, `${id}: the readout stays`);
    await page.keyboard.press("ArrowLeft");
    assert.notDeepEqual(await drawings(page), after, `${id}: the way back is not drawn`);
  }
  const count = () => page.locator("#explorer-logit-drawing path[data-loss]").count();
  const curves = await count();
  await page.locator("#explorer-show-cosface").check();
  assert.equal(await count(), curves + 1, "a chosen loss is not drawn");
  assert.ok(await page.locator("#explorer-cosface").isVisible(), "a chosen loss has no slider");
  await page.locator("#explorer-show-cosface").uncheck();
  assert.equal(await count(), curves, "a loss that is not chosen is drawn");
}

async function keysAndPointerTurn(page, url) {
  await follow(page, url, "theta=30");
  for (const name of PLOTS) {
    const plot = page.locator(`#explorer-${name}`);
    await plot.focus();
    for (const [key, degrees] of [["Home", 0], ["ArrowRight", 1], ["PageUp", 11], ["ArrowLeft", 10], ["End", 180], ["ArrowRight", 180]]) {
      const rows = await readout(page);
      await page.keyboard.press(key);
      assert.equal(await plot.getAttribute("aria-valuenow"), `${degrees}`, `${name}: ${key}`);
      if (degrees !== 180) assert.notEqual(await readout(page), rows, `${name}: ${key} leaves the readout`);
      assert.match(await plot.getAttribute("aria-valuetext"), new RegExp(`^\\d\\.\\d{3} rad \\(${degrees}°\\); Normalised softmax `));
    }
    await plot.scrollIntoViewIfNeeded();
    const box = await plot.boundingBox();
    await page.mouse.move(box.x + (box.width * 197) / 360, box.y + box.height / 2);
    assert.equal(await plot.getAttribute("aria-valuenow"), "90", `${name}: the pointer`);
    assert.equal(await page.locator("#explorer-angle").innerText(), "At θ = 1.571 rad (90°)");
  }
}

async function state(page) {
  const inputs = await page.locator("#explorer input").evaluateAll((all) => all.map((input) => [input.id, input.value, input.checked]));
  return { inputs, rows: await readout(page), ...(await drawings(page)) };
}

async function aLinkRestores(page, url) {
  await page.goto("about:blank");
  await page.goto(url);
  const start = await state(page);
  assert.equal(new URL(page.url()).hash, "", "a visit alone changes the address");
  await page.locator("#explorer-show-adaface").check();
  for (const [id, presses] of [["show-adaface", 0], ["adaface", 3], ["s", 5], ["C", 2], ["other", 7], ["gradient", 9]]) {
    await page.locator(`#explorer-${id}`).focus();
    for (let i = 0; i < presses; i++) await page.keyboard.press("ArrowRight");
  }
  await page.locator("#explorer-copy").click();
  await page.locator("#explorer-said").filter({ hasText: /link/i }).waitFor();
  const [link, kept] = [page.url(), await state(page)];
  assert.match(link, /[,=]adaface:0\.3&/);
  assert.notDeepEqual(kept, start);

  const other = await page.context().newPage();
  await other.goto(link);
  assert.deepEqual(await state(other), kept, "a link does not restore the settings");
  await other.locator("#explorer button[type=reset]").click();
  assert.deepEqual(await state(other), start, "the reset leaves something");
  await other.goto(`${url}#losses=nothing,arcface:x,cosface:0.3501&s=-4&C=999&theta=no&other=1e9`);
  await other.waitForSelector("#explorer-s[aria-valuetext='1']");
  const rows = await readout(other);
  assert.match(rows, /CosFace\s+m = 0.35\b/);
  assert.match(rows, /ArcFace\s+m = 0.5\b/);
  assert.equal(await other.locator("#explorer-rows tr").count(), 2);
  await other.close();
}

async function fitsAPhone(page, url) {
  const before = page.viewportSize();
  await page.setViewportSize({ width: 390, height: 844 });
  await page.goto(url);
  for (const box of await page.locator("#explorer input[type=checkbox]").all()) await box.check();
  const over = await page.evaluate(() => document.documentElement.scrollWidth - window.innerWidth);
  assert.ok(over <= 0, `${over} pixels too wide with every loss`);
  for (const target of await page.locator("#explorer input, #explorer button").all()) {
    const { width, height } = await target.boundingBox();
    assert.ok(Math.min(width, height) >= 24, `${await target.getAttribute("id")}: ${width} x ${height} is too small to touch`);
  }
  await page.setViewportSize(before);
}

async function standsWithoutScript(page, url, address) {
  const context = await page.context().browser().newContext({ javaScriptEnabled: false });
  const plain = await context.newPage();
  const figure = plain.waitForResponse((response) => response.url().startsWith(new URL("_static/explorer.svg", address).href));
  await plain.goto(url);
  assert.equal((await figure).status(), 200);
  assert.ok(await plain.locator("#explorer-static img").isVisible(), "no figure without a script");
  assert.ok(!(await plain.locator("#explorer").isVisible()), "dead controls without a script");
  await context.close();
  assert.ok(!(await page.locator("#explorer-static").isVisible()), "the figure stays beside the plots");
}
