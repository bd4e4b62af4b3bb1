// Every page of the site in Chromium: node check.mjs CHROMIUM ADDRESS FOLDER [PAGE ...]
import { existsSync, readFileSync, readdirSync } from "node:fs";
import { createRequire } from "node:module";
import path from "node:path";
import { chromium } from "playwright-core";

const [executablePath, address, folder, ...wanted] = process.argv.slice(2);
const axe = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const LIMIT = 1e6; // bytes of a page apart from its figures
const WIDE = { width: 1280, height: 900 };
const MIDDLE = { width: 768, height: 1024 };
const NARROW = { width: 390, height: 844 };
// A page of each type, which is looked at in dark mode too.
const TYPES = [
  "index.html",
  "reference/losses.html",
  "explanation/comparison.html",
  "explanation/chunked_softmax.html",
  "explorer.html",
  "tutorial/index.html",
  "tutorial/plot_1_first_embedding.html",
  "how_to/choose_a_loss.html",
  "how_to/troubleshooting.html",
  "explanation/geometry.html",
  "brain_tumor/report.html",
  "reference/index.html",
  "reference/functional.html",
  "reference/generated/angular_losses.ArcFaceLoss.html",
  "changelog.html",
  "search.html",
];
// Made by Sphinx for itself, without a place in the site's menu.
const NOT_PAGES = new Set(["genindex.html", "py-modindex.html"]);

const faults = [];
const fault = (page, text) => faults.push(`${page}: ${text}`);
const pages = (wanted.length ? wanted : htmlFiles(folder)).filter((page) => !page.startsWith("_"));

function htmlFiles(root, inside = "") {
  return readdirSync(path.join(root, inside), { withFileTypes: true }).flatMap((entry) => {
    const name = path.posix.join(inside, entry.name);
    if (entry.isDirectory()) return entry.name.startsWith("_") ? [] : htmlFiles(root, name);
    return name.endsWith(".html") ? [name] : [];
  });
}

const browser = await chromium.launch({
  executablePath,
  args: [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
  ],
});

async function open(name, options = {}) {
  const context = await browser.newContext({ viewport: WIDE, ...options });
  const page = await context.newPage();
  const seen = { bytes: 0 };
  page.on("console", (message) => {
    if (["error", "warning"].includes(message.type())) fault(name, `console: ${message.text()}`);
  });
  page.on("pageerror", (error) => fault(name, `script: ${error.message}`));
  page.on("request", (request) => {
    const url = request.url();
    if (!url.startsWith(address) && !url.startsWith("data:") && !url.startsWith("blob:"))
      fault(name, `leaves the site: ${url}`);
  });
  page.on("response", async (response) => {
    if (response.status() >= 400) fault(name, `${response.status()}: ${response.url()}`);
    if (!/^(image|font)\//.test(response.headers()["content-type"] ?? ""))
      seen.bytes += Number(response.headers()["content-length"] ?? 0);
  });
  await page.goto(new URL(name, address).href, { waitUntil: "load" });
  return { page, seen, close: () => context.close() };
}

async function accessible(page, name) {
  await page.evaluate(axe);
  const { violations } = await page.evaluate(() => axe.run());
  for (const { id, impact, nodes, help } of violations)
    if (["serious", "critical"].includes(impact))
      fault(name, `axe, ${impact}: ${id}: ${help}: ${nodes.map((n) => n.target).slice(0, 4).join("  ")}`);
}

// What a page has, to be checked when all are known.
const anchors = new Map();
const links = [];

for (const name of pages) {
  const { page, seen, close } = await open(name);
  const found = await page.evaluate(() => ({
    title: document.title.trim(),
    language: document.documentElement.lang,
    headings: document.querySelectorAll("h1").length,
    main: document.querySelectorAll("main, [role=main]").length,
    nav: document.querySelectorAll("nav, [role=navigation]").length,
    unnamed: [...document.images].filter((image) => !image.alt.trim()).map((image) => image.src),
    ids: [...document.querySelectorAll("[id]")].map((element) => element.id),
    links: [...document.querySelectorAll("a[href]")].map((link) => link.href),
  }));
  if (!found.title) fault(name, "has no title");
  if (!found.language) fault(name, "does not say its language");
  if (found.headings !== 1) fault(name, `has ${found.headings} main headings`);
  if (found.main !== 1 || !found.nav) fault(name, "lacks a landmark (main, navigation)");
  for (const image of found.unnamed) fault(name, `image without a text: ${image}`);
  if (seen.bytes > LIMIT) fault(name, `weighs ${seen.bytes} bytes apart from figures`);
  anchors.set(name, new Set(found.ids));
  links.push(...found.links.map((link) => [name, link]));
  if (!NOT_PAGES.has(name)) await accessible(page, name);
  await page.setViewportSize(NARROW);
  const over = await page.evaluate(() => document.documentElement.scrollWidth - window.innerWidth);
  if (over > 0) fault(name, `is ${over} pixels too wide for a phone`);
  await close();
}

for (const [name, link] of links) {
  if (!link.startsWith(address)) continue;
  const url = new URL(link);
  const target = decodeURIComponent(url.pathname.slice(1)) || "index.html";
  if (!existsSync(path.join(folder, target))) fault(name, `broken link: ${link}`);
  const anchor = decodeURIComponent(url.hash.slice(1));
  if (anchor && anchors.has(target) && !target.startsWith("explorer") && !anchors.get(target).has(anchor))
    fault(name, `broken anchor: ${link}`);
}

for (const name of TYPES.filter((type) => pages.includes(type))) {
  for (const colorScheme of ["light", "dark"]) {
    for (const [width, viewport] of Object.entries({ 1280: WIDE, 390: NARROW })) {
      const { page, close } = await open(name, { colorScheme, viewport });
      if (colorScheme === "dark") await accessible(page, `${name} (dark, ${width})`);
      if (process.env.SCREENSHOTS)
        await page.screenshot({
          path: path.join(
            process.env.SCREENSHOTS,
            `${name.replace(/\W+/g, "_")}-${width}-${colorScheme}.png`,
          ),
        });
      await close();
    }
  }
}

if (pages.includes("search.html")) {
  const { page, close } = await open("search.html?q=arcface");
  await page.waitForSelector("#search-results li a", { timeout: 15000 });
  await close();
}

if (pages.includes("reference/losses.html")) {
  const { page, close } = await open("reference/losses.html");
  const column = (index) =>
    page.$$eval(
      "table.losses-table tbody tr:not([hidden])",
      (rows, index) => rows.map((row) => row.cells[index].textContent.trim()),
      index,
    );
  const header = page.locator("table.losses-table th", { hasText: "year" });
  const all = (await column(0)).length;
  for (const [direction, order] of [["ascending", 1], ["descending", -1]]) {
    await header.locator("button").press("Enter");
    const years = await column(4);
    const sorted = [...years].sort((a, b) => order * (a - b));
    if (years.join() !== sorted.join()) fault("reference/losses.html", `years are not ${direction}`);
    if ((await header.getAttribute("aria-sort")) !== direction)
      fault("reference/losses.html", `the header does not say ${direction}`);
  }
  await page.getByLabel("Show losses with").fill("learned BIAS");
  const found = (await column(0)).sort().join();
  if (found !== "SphereFace2Loss,UniFaceLoss") fault("reference/losses.html", `the filter found ${found}`);
  await page.getByLabel("Show losses with").fill("");
  if ((await column(0)).length !== all) fault("reference/losses.html", "the filter does not let go");
  await close();
}

// A table wider than its page scrolls by itself, and its first column stays in sight.
for (const name of ["reference/losses.html", "explanation/comparison.html"].filter((wide) => pages.includes(wide))) {
  for (const viewport of [WIDE, MIDDLE, NARROW]) {
    const { page, close } = await open(name, { viewport });
    const { over, moved, left } = await page.evaluate(() => {
      const table = document.querySelector("table.wide-table");
      const first = table.rows[1].cells[0];
      const before = first.getBoundingClientRect().left;
      table.parentElement.scrollLeft = table.scrollWidth;
      return {
        over: document.documentElement.scrollWidth - window.innerWidth,
        moved: table.parentElement.scrollLeft,
        left: before - first.getBoundingClientRect().left,
      };
    });
    if (over > 0) fault(name, `is ${over} pixels too wide at ${viewport.width}`);
    if (left > 8) fault(name, `at ${viewport.width} the first column moves by ${left} of ${moved} pixels`);
    await close();
  }
}

// The explorer of the home page draws what is set, and its link takes that along.
if (pages.includes("index.html")) {
  const { page, close } = await open("index.html");
  const curve = () => page.locator('#explorer-logit-drawing path[data-loss="arcface"]').getAttribute("d");
  const before = await curve();
  await page.locator("#explorer-arcface").focus();
  await page.keyboard.press("ArrowRight");
  if ((await curve()) === before) fault("index.html", "the slider does not move the curve");
  await page.waitForFunction(() => document.querySelector("#explorer-link").hash);
  await page.locator("#explorer-link").click();
  await page.waitForSelector("#explorer-setting-arcface:not([hidden])");
  if ((await curve()) === before) fault("index.html", "the link loses the settings");
  if (!page.url().includes("arcface:0.55")) fault("index.html", `the link leads to ${page.url()}`);
  await close();
}

if (pages.includes("explorer.html")) {
  const explorer = path.join(import.meta.dirname, "explorer.mjs");
  const { check } = await import(explorer);
  const expected = JSON.parse(readFileSync(path.join(import.meta.dirname, "expected.json"), "utf8"));
  const { page, close } = await open("explorer.html");
  try {
    await check(page, address, expected);
  } catch (error) {
    fault("explorer.html", error.message);
  }
  await close();
}

await browser.close();
console.log(`${pages.length} pages, ${links.length} links`);
if (faults.length) {
  console.error([...new Set(faults)].join("\n"));
  console.error(`${faults.length} faults`);
  process.exit(1);
}
