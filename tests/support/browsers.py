"""A page in headless Chromium: how wide it is, what it loads, and whether its text can be read."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars",
)  # fmt: skip
PROBE = """<script nonce="probe">
const refused = [];
document.addEventListener("securitypolicyviolation", e => refused.push(e.effectiveDirective + " " + e.blockedURI));
function light(text) {
  const parts = text.match(/[\\d.]+/g).slice(0, 3).map(x => x / 255);
  const [r, g, b] = parts.map(x => x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
function name(e) { return e.tagName + " " + (e.id || e.textContent.trim().slice(0, 40)); }
addEventListener("load", () => setTimeout(() => {
  const all = [...document.querySelectorAll("*")], style = getComputedStyle(document.body);
  const lights = [light(style.color), light(style.backgroundColor)].sort((a, b) => b - a);
  const cut = [...document.querySelectorAll("svg g[id*='-text_']")].filter(text => {
    const box = text.getBoundingClientRect(), page = text.ownerSVGElement.getBoundingClientRect();
    return box.width && (box.left < page.left - 1 || box.right > page.right + 1 || box.top < page.top - 1 ||
      box.bottom > page.bottom + 1);
  });
  const found = {
    inner_width: innerWidth,
    scroll_width: document.scrollingElement.scrollWidth,
    dark: matchMedia("(prefers-color-scheme: dark)").matches,
    contrast: (lights[0] + 0.05) / (lights[1] + 0.05),
    scripts: document.scripts.length - 1,
    handlers: all.filter(e => [...e.attributes].some(a => a.name.startsWith("on"))).map(name),
    outside: all.flatMap(e => [...e.attributes]).filter(a => /^(src|href|xlink:href|action|data|poster)$/.test(a.name) &&
      !/^(#|data:)/.test(a.value)).map(a => a.value),
    loaded: performance.getEntriesByType("resource").map(e => e.name).filter(n => !n.startsWith("data:")),
    refused,
    cut: cut.map(name),
    drawings: document.querySelectorAll("svg").length,
    texts: document.querySelectorAll("svg g[id*='-text_']").length,
  };
  parent.postMessage(found, "*");
}));
</script>"""
"""Measures the page that it is put into, and tells the page around it."""
FRAMES = """<!doctype html><meta charset="utf-8"><style>:root { color-scheme: light dark }</style><pre id="found"></pre><script>
const found = [];
addEventListener("message", e => { found.push(e.data); document.getElementById("found").textContent = JSON.stringify(found); });
</script>"""
"""The page around: a window of the browser has a least width, a frame has none."""


def chromium() -> str:
    """The program, or a skip with the reason."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip(f"there is no {', '.join(NAMES)} here")
    return found


def measured(page: Path, widths: Sequence[int], scratch: Path) -> list[dict[str, Any]]:
    """What a page is in frames of these widths, on light and then on dark paper: the keys of `found` in `PROBE`.

    The page's own policy forbids scripts, so in the copy that is measured it lets the probe run, and nothing else.
    """
    policy, head = "default-src 'none';", '<meta name="viewport"'
    text = page.read_text(encoding="utf-8")
    assert (text.count(policy), text.count(head)) == (1, 1)
    text = text.replace(policy, f"{policy} script-src 'nonce-probe';").replace(head, PROBE + head)
    (scratch / "probed.html").write_text(text, encoding="utf-8")
    frames = "".join(
        f'<iframe src="probed.html" style="width: {width}px; height: 900px; border: 0; color-scheme: {scheme}"></iframe>'
        for scheme in ("light", "dark")
        for width in widths
    )
    (scratch / "frames.html").write_text(FRAMES + frames, encoding="utf-8")
    words = [chromium(), *QUIET, f"--user-data-dir={scratch / 'profile'}", "--window-size=2000,1000"]
    done = subprocess.run(
        [*words, "--virtual-time-budget=10000", "--dump-dom", (scratch / "frames.html").as_uri()],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    found = re.search(r'<pre id="found">(\[.*?\])</pre>', done.stdout, re.DOTALL)
    assert found, (done.stdout[-500:], done.stderr[-2000:])
    rows: list[dict[str, Any]] = json.loads(html.unescape(found[1]))
    return sorted(rows, key=lambda row: (bool(row["dark"]), int(row["inner_width"])))
