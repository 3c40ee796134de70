"""The report in a real browser: filters, search, keys, the cursor, differences, several runs, a run that goes on, hostility.

Needs headless Chromium and Playwright, which are not in the test extra because together they take half a gigabyte:
`apt-get install chromium` and `pip install playwright` (CHROMIUM names another executable). Without them all of it is skipped.
The figures of a large run: `python -m pytest -m slow -s tests/grpo_jax/test_report_browser.py`.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import threading
import time
from pathlib import Path

import pytest

from grpo_jax.metrics import Log
from grpo_jax.report import page as pages
from grpo_jax.report import server
from grpo_jax.reward import judge
from tests.grpo_jax import made_run

sync_api = pytest.importorskip("playwright.sync_api", reason="no Playwright: pip install playwright")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
if not CHROMIUM:
    pytest.skip("no Chromium: apt-get install chromium, or name its executable in CHROMIUM", allow_module_level=True)

PATIENCE = 180_000  # milliseconds: a machine may be busy


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        one = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=PATIENCE)
        yield one
        one.close()


@pytest.fixture
def tab(browser):
    """A page that fails its test where a script of it does, or where it asks anything of anybody but its own address."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(PATIENCE)
    one = context.new_page()
    one.problems = []
    one.on("pageerror", lambda error: one.problems.append(str(error)))
    one.on("console", lambda message: one.problems.append(message.text) if message.type == "error" else None)
    one.on("request", lambda r: one.problems.append(r.url) if not r.url.startswith(("file:", "http://127.0.0.1:")) else None)
    yield one
    problems = one.problems
    context.close()
    assert problems == []


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """The page of one run."""
    folder = made_run.make(tmp_path_factory.mktemp("made") / "one", steps=24, groups=6, size=4)
    pages.write([folder], folder / "report.html")
    return folder / "report.html"


@pytest.fixture(scope="module")
def rows(made) -> list[dict]:
    return [json.loads(line) for line in (made.parent / "rollouts.jsonl").read_text().splitlines()]


def show(tab, file: Path, address: str = "") -> None:
    tab.goto(file.as_uri() + address)
    tab.wait_for_selector("body[data-ready]", state="attached")


def counted(tab, count: int) -> None:
    """Waits until the list says that so many groups are left."""
    tab.wait_for_function("n => document.getElementById('count').textContent.startsWith(`${n} of `)", arg=f"{count:,}")


def test_the_overview_says_in_words_and_curves_what_came_of_it(tab, made):
    show(tab, made)
    assert "Validation accuracy rose from 25.0% (95 % interval 19.5 to 31.4)" in tab.inner_text("#summary")
    titles = tab.locator(".panel figcaption").all_inner_texts()
    assert titles[:6] == [title for _, title in pages.panels.PANELS]
    assert {"reasons of sampled responses", "groups of equal rewards", "clipped tokens", "time of a step (s)"} < {*titles}
    assert tab.locator(".panel canvas").count() == len(titles)
    drawn = "canvas => canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data.some(byte => byte > 0)"
    assert all(tab.locator(".panel canvas").nth(i).evaluate(drawn) for i in range(len(titles)))
    label = tab.locator(".panel").nth(4).get_attribute("aria-label")
    assert label.startswith("reward, mean. value: ") and label.endswith("last")
    tab.locator("#curves summary").click()  # metrics that no panel knows
    tab.locator(".panel figcaption", has_text="strange/metric").wait_for()


def test_one_cursor_goes_through_all_curves_by_mouse_and_by_key(tab, made):
    show(tab, made)
    over = tab.locator(".panel .u-over").nth(4)
    over.scroll_into_view_if_needed()
    box = over.bounding_box()
    over.hover(position={"x": box["width"] / 2, "y": 40})
    tab.wait_for_function("document.getElementById('readout').textContent.startsWith('step 12')")
    steps = "curves.charts.map(({ plot }) => plot.cursor.idx === null ? null : plot.data[0][plot.cursor.idx])"
    at = tab.evaluate(steps)
    assert set(at) <= {10, 12, 15} and at[4] == 12  # validation is each fifth step
    value = json.loads((made.parent / "metrics.jsonl").read_text().splitlines()[12])["kl/mean"]
    assert tab.locator(".panel").nth(0).locator(".u-value").last.inner_text() == f"{value:g}"
    figure = tab.locator(".panel").nth(4)
    figure.focus()
    tab.keyboard.press("ArrowRight")
    tab.wait_for_function("document.getElementById('readout').textContent.startsWith('step 13: value')")
    assert tab.evaluate(steps)[0] == 13
    tab.keyboard.press("End")
    tab.keyboard.press("Enter")  # the rollouts of the last step
    counted(tab, 6)
    assert tab.locator("#from").input_value() == tab.locator("#to").input_value() == "24"


def test_curves_are_smoothed_scaled_and_zoomed(tab, made):
    show(tab, made)
    assert tab.evaluate("curves.charts[4].plot.series.length") == 3  # steps, raw, smoothed
    slide = "value => { const e = document.getElementById('smoothing'); e.value = value; e.dispatchEvent(new Event('input')); }"
    tab.evaluate(slide, "0")
    assert tab.evaluate("curves.charts[4].plot.series.length") == 2 and tab.inner_text("#smoothing-width") == "off"
    tab.evaluate(slide, "20")
    rough, smooth = tab.evaluate("[1, 2].map(i => curves.charts[4].plot.data[i])")
    jumps = lambda values: sum(abs(a - b) for a, b in zip(values, values[1:], strict=False))  # noqa: E731
    assert jumps(smooth) < jumps(rough)
    tab.check("#log")
    assert tab.evaluate("curves.charts[4].plot.scales.y.distr") == 3
    tab.uncheck("#log")
    box = tab.locator(".panel .u-over").nth(1).bounding_box()
    tab.mouse.move(box["x"] + 0.25 * box["width"], box["y"] + 30)
    tab.mouse.down()
    tab.mouse.move(box["x"] + 0.75 * box["width"], box["y"] + 30, steps=5)
    tab.mouse.up()
    low, high = tab.evaluate("(({ min, max }) => [min, max])(curves.charts[4].plot.scales.x)")
    assert 5 < low < 7 and 17 < high < 19
    tab.click("#unzoom")
    assert tab.evaluate("curves.charts[4].plot.scales.x.max") == 24


FILTERS = {
    "steps": ({"from": "3", "to": "5"}, lambda row: 3 <= row["step"] <= 5),
    "reward at least": ({"least": "1"}, lambda row: any(r["value"] >= 1 for r in row["responses"])),
    "reward at most": ({"most": "0.5"}, lambda row: any(r["value"] <= 0.5 for r in row["responses"])),
    "reason": ({"reason": "another tool"}, lambda row: any(r["reason"] == "wrong_name" for r in row["responses"])),
    "rewards differ": ({"variance": "differ"}, lambda row: len({r["value"] for r in row["responses"]}) > 1),
    "rewards equal": ({"variance": "all equal"}, lambda row: len({r["value"] for r in row["responses"]}) == 1),
    "another type": ({"difference": "another type"}, lambda row: any(differs(r, row, '"count": "') for r in row["responses"])),
    "missing": ({"difference": "an argument is missing"}, lambda row: any(differs(r, row, "") for r in row["responses"])),
    "tool": ({"tool": "get_weather"}, lambda row: "get_weather" in json.dumps(row["answer"])),
    "a word": ({"search": "Quartz"}, lambda row: "quartz" in (row["prompt"].split("user")[-1] + texts(row)).lower()),
    "two at once": (
        {"from": "10", "reason": "correct", "variance": "differ"},
        lambda row: row["step"] >= 10 and len({r["reason"] == "correct" for r in row["responses"]}) > 1,
    ),
}


def differs(response: dict, row: dict, sign: str) -> bool:
    """Whether a response of made_run has the count as a text (sign) or, for "", lacks the argument `exact`."""
    text = response["text"]
    if sign:
        return sign in text
    return response["reason"] == "wrong_arguments" and '"exact"' not in text


def texts(row: dict) -> str:
    return "\n".join(response["text"] for response in row["responses"])


@pytest.fixture(scope="module")
def filtered(browser, made):
    """One page for all filters."""
    one = browser.new_page(viewport={"width": 1280, "height": 900})
    one.set_default_timeout(PATIENCE)
    show(one, made, "#rollouts")
    yield one
    one.close()


@pytest.mark.parametrize("name", FILTERS)
def test_every_filter_leaves_the_groups_that_it_should(filtered, rows, name):
    values, wanted = FILTERS[name]
    counted(filtered, len(rows))
    for place, value in values.items():
        if place in ("reason", "variance", "difference"):
            filtered.select_option(f"#{place}", label=value)
        else:
            filtered.fill(f"#{place}", value)
    expected = [i for i, row in enumerate(rows) if wanted(row)]
    assert 0 < len(expected) < len(rows)
    counted(filtered, len(expected))
    assert filtered.evaluate("rollouts.shown") == expected
    filtered.click("#filters button[type=reset]")
    counted(filtered, len(rows))


def test_what_is_searched_for_is_marked(tab, made, rows):
    word = rows[7]["responses"][2]["text"].split()[3]
    show(tab, made, "#group=0.2.1")
    tab.fill("#search", word.upper())
    tab.locator("#detail mark").first.wait_for()
    assert {text.lower() for text in tab.locator("#detail mark").all_inner_texts()} == {word}


def test_the_link_leads_to_the_group_and_keys_go_through_the_list(tab, made, rows):
    show(tab, made, "#group=0.5.2")
    tab.locator("#detail h3", has_text="Step 5, group 3").wait_for()
    request = rows[4 * 6 + 2]["prompt"].split("<|im_start|>user\n")[1].split("<|im_end|>")[0]
    assert tab.inner_text("#detail .request-full") == request
    for key, title in (("j", "Step 5, group 4"), ("k", "Step 5, group 3"), ("n", "Step 6, group 1"), ("p", "Step 5, group 1")):
        tab.keyboard.press(key)
        tab.locator("#detail h3", has_text=title).wait_for()
    assert tab.evaluate("location.hash") == "#group=0.5.0"
    tab.focus("#list")
    tab.keyboard.press("End")
    tab.locator("#detail h3", has_text="Step 24, group 6").wait_for()
    assert tab.locator("#list .row[aria-selected=true]").get_attribute("aria-posinset") == str(len(rows))
    assert tab.locator("#list .row").count() < 40  # of 144: only what is in sight
    tab.keyboard.press("s")
    tab.wait_for_function("document.querySelectorAll('#detail .card').length === 6")
    tab.keyboard.press("/")
    tab.wait_for_function("document.activeElement.id === 'search'")


def test_arguments_are_held_against_the_right_ones(tab, tmp_path):
    """Each response of one group is wrong in another way; the page names it."""
    folder = made_run.make(tmp_path / "run", steps=1, groups=1)
    task = made_run.task(random.Random(0), 0)
    replies = [made_run.reply(random.Random(way), task["answer"][0], way) for way in range(10)]
    scored = [judge(text, task["answer"]) for text in replies]
    responses = [
        {
            "text": t,
            "token_count": 9,
            "truncated": t is replies[3],
            "value": s.value,
            "reason": s.reason,
            "advantage": 0.5 - s.value,
        }
        for t, s in zip(replies, scored, strict=True)
    ]
    log = Log.open(folder, 1, tensorboard=False)
    log.rollouts([{"step": 2, **task, "learned": False, "responses": responses}])
    log.close()
    pages.write([folder], folder / "report.html")
    show(tab, folder / "report.html", "#group=0.2.0")
    shown = tab.locator("article.response")
    tab.wait_for_function("document.querySelectorAll('article.response').length === 10")
    told = [shown.nth(i).locator(".diff").inner_text() for i in range(10)]
    count = task["answer"][0]["arguments"]["count"]
    assert told[0] == "✓ the right calls"
    line = lambda way, name: next(row for row in told[way].splitlines() if row.startswith(name)).split("\t")  # noqa: E731
    assert line(1, "count") == ["count", f'"{count}"', str(count), "✗ other type"]
    assert line(2, "place")[1] == '"elsewhere"' and line(2, "place")[3] == "✗ other value"
    assert line(3, "exact")[1] == "–" and line(3, "exact")[3] == "✗ missing"
    assert line(4, "day") == ["day", '"today"', "–", "✗ too many"]
    assert "✗ another tool, wanted " + task["answer"][0]["name"] in told[5]
    assert "find_hotel ✗ a call too many" in told[6]
    assert "✗ a call is missing" in told[7]
    assert told[8] == "no calls that can be read"
    assert told[9] == "✓ the right calls" and "no thought or no tool_call block" in shown.nth(9).inner_text()
    assert "cut at the limit" in shown.nth(3).inner_text() and "advantage -0.5 · 9 tokens" in shown.nth(0).inner_text()
    assert shown.nth(0).locator(".piece.think").count() == shown.nth(0).locator(".piece.call").count() == 1
    assert shown.nth(9).locator(".piece.think").count() == 0
    assert "not learned" in tab.inner_text(".row[aria-selected=true]")
    tab.click("#detail details[data-name=tools] summary")
    assert tab.locator("#detail details[data-name=tools] .turn").count() == 4


def test_runs_lie_on_top_of_each_other_and_the_legend_says_how_they_differ(tab, tmp_path):
    one = made_run.make(tmp_path / "one", steps=8)
    two = made_run.make(tmp_path / "two", steps=12, groups=2, seed=1, optimizer__learning_rate=1e-5)
    pages.write([one, two], tmp_path / "report.html")
    show(tab, tmp_path / "report.html")
    assert tab.locator("#legend li").all_inner_texts() == [
        "one, steps 8, learning_rate 1e-06",
        "two, steps 12, learning_rate 1e-05",
    ]
    assert tab.evaluate("curves.charts[4].plot.data.map(values => values.filter(value => value !== null).length)") == [
        12,
        8,
        12,
    ]
    assert tab.locator(".run-summary h3").count() == 2
    tab.click("#to-values")
    tab.check("#only-differing")
    differing = tab.locator("#settings tbody tr td:first-child").all_inner_texts()
    assert differing == ["run.steps", "optimizer.learning_rate"]
    tab.click("#to-rollouts")
    counted(tab, 32)
    tab.select_option("#run", index=1)
    counted(tab, 24)
    tab.goto((tmp_path / "report.html").as_uri() + "#group=1.12.1")
    tab.locator("#detail h3", has_text="Step 12, group 2").wait_for()


def test_a_run_that_goes_on_is_shown_without_losing_the_place(tab, tmp_path):
    """The live page takes in new steps, and a run that begins anew; filter, scroll and choice stay."""
    folder = made_run.make(tmp_path / "run", steps=20, groups=8)
    shown = server.make(pages.Page([folder]), 0)
    threading.Thread(target=shown.serve_forever, daemon=True).start()
    try:
        tab.goto(f"http://127.0.0.1:{shown.server_port}/#rollouts")
        counted(tab, 160)
        tab.select_option("#variance", label="any")
        tab.fill("#from", "2")
        counted(tab, 152)
        tab.evaluate("document.getElementById('list').scrollTop = 3000")
        tab.locator(".row[aria-posinset='55']").click()
        chosen = tab.inner_text("#detail h3")
        tab.evaluate("document.getElementById('detail').scrollTop = 50")
        before = tab.evaluate("[document.getElementById('list').scrollTop, document.getElementById('detail').scrollTop]")
        chance = random.Random(5)
        rows = [made_run.group(chance, 21, made_run.task(chance, i), 1.0, 4) for i in range(8)]
        log = Log.open(folder, 20, tensorboard=False)
        log.rollouts(rows)
        log.step(made_run.row_of(21, 21, rows, chance))
        with (folder / "metrics.jsonl").open("ab") as file:
            file.write(b'{"step": 22, "rew')  # being written
        counted(tab, 160)
        assert tab.inner_text("#detail h3") == chosen and tab.input_value("#from") == "2"
        assert before == tab.evaluate(
            "[document.getElementById('list').scrollTop, document.getElementById('detail').scrollTop]"
        )
        tab.wait_for_function("manifest.runs[0].metrics.step.at(-1) === 21")
        assert "The last line of metrics.jsonl has no end" in tab.locator("#summary").text_content()
        tab.fill("#search", texts(rows[7]).split()[1])
        tab.wait_for_function("!document.getElementById('count').textContent.startsWith('reading')")
        tab.fill("#search", "")
        counted(tab, 160)
        Log.open(folder, 10, tensorboard=False).close()  # started again from an earlier checkpoint
        counted(tab, 72)
        assert tab.inner_text("#detail h3") == chosen
        shown.shutdown()
        shown.server_close()
        tab.locator("#notice", has_text="has ended").wait_for()
        tab.problems.clear()  # that nobody answers is what the browser complains of
    finally:
        shown.shutdown()
        shown.server_close()


HOSTILE = {
    "a script": "</script><script>window.broken = 1</script>",
    "an image": "<img src=x onerror='window.broken = 2'><svg onload='window.broken = 2'>",
    "a comment": "<!--<script>window.broken = 3//-->]]>",
    "null bytes": "before\x00after",
    "marks of direction": "price \u202e001 \u2066$\u2069",
    "half a pair": "half \ud83d and \ude00 alone",
    "an escape": "\x1b[31mred",
    "separators": "one\u2028two\u2029three",
}


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Path:
    """The page of a run in which everything that a model or a row may write is hostile."""
    folder = made_run.make(tmp_path_factory.mktemp("hostile") / "</script><script>", steps=1, groups=1)
    every = "".join(HOSTILE.values())
    answer = [{"name": HOSTILE["an image"], "arguments": {HOSTILE["a script"]: HOSTILE["an image"], "n": 1}}]
    call = json.dumps([{"name": HOSTILE["an image"], "arguments": {HOSTILE["a script"]: every, every: [every]}}])
    said = [*HOSTILE.values(), "x" * 1_000_000 + HOSTILE["a script"], f"<think>{every}</think><tool_call>{call}</tool_call>"]
    responses = [
        {"text": text, "token_count": 1, "truncated": False, "value": 0.0, "reason": HOSTILE["a script"], "advantage": None}
        for text in said
    ]
    tool = json.dumps({"type": "function", "function": {"name": HOSTILE["an image"], "description": every}})
    prompt = f"<|im_start|>system\n{tool}\n<|im_end|>\n<|im_start|>user\n{every}<|im_end|>\n"
    log = Log.open(folder, 1, tensorboard=False)
    log.rollouts(
        [{"step": 2, "id": HOSTILE["an image"], "prompt": prompt, "answer": answer, "learned": True, "responses": responses}]
    )
    log.step({"step": 2, "reward/mean": 0.0, f"reason/{HOSTILE['a script']}": 1.0, HOSTILE["an image"]: 1.0})
    log.close()
    config = json.loads((folder / "config.json").read_text()) | {HOSTILE["an image"]: every}
    (folder / "config.json").write_text(json.dumps(config))
    pages.write([folder], folder / "report.html")
    return folder / "report.html"


def test_nothing_that_a_model_wrote_is_markup_or_script(tab, hostile):
    show(tab, hostile, "#group=0.2.0")
    tab.wait_for_function("document.querySelectorAll('article.response').length === 10")
    for fold in tab.locator("#detail details summary").all():
        fold.click()
    tab.get_by_text("show all 1,000,0").click()
    tab.fill("#search", "<script>window")
    tab.locator("#detail mark").first.wait_for()
    tab.keyboard.press("Escape")
    tab.click("#detail button:has-text('side by side')")
    tab.locator(".card").wait_for()
    for view in ("#to-values", "#to-overview"):
        tab.click(view)
    tab.locator("#curves summary").click()
    assert tab.evaluate("window.broken") is None
    assert tab.locator("main img, main svg:not(#legend svg), main script").count() == 0


def test_what_is_not_seen_is_shown_and_texts_stay_as_they_are(tab, hostile):
    show(tab, hostile, "#group=0.2.0")
    tab.wait_for_function("document.querySelectorAll('article.response').length === 10")
    shown = [tab.locator("article.response").nth(i).locator(".piece .text").text_content() for i in range(len(HOSTILE))]
    escaped = {c: f"\\x{ord(c):02x}" for c in "\x00\x1b"}
    escaped |= {c: f"\\u{ord(c):04x}" for c in ("\u202e", "\u2066", "\u2069", "\u2028", "\u2029", "\ud83d", "\ude00")}
    assert shown == ["".join(escaped.get(c, c) for c in text) for text in HOSTILE.values()]


def test_the_page_lets_no_script_run_but_its_own(tab, hostile):
    """The belt to the braces: markup that did get in could do nothing."""
    show(tab, hostile)
    tab.evaluate("document.body.insertAdjacentHTML('beforeend', `<img src=x onerror='window.broken = 1'>`)")
    tab.evaluate("document.body.append(Object.assign(document.createElement('script'), { text: 'window.broken = 1' }))")
    assert tab.evaluate("fetch('https://example.org/').then(() => 'went', () => 'refused')") == "refused"
    tab.wait_for_timeout(200)
    assert tab.evaluate("window.broken") is None
    assert any("Content Security Policy" in problem for problem in tab.problems)
    tab.problems.clear()


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_the_window(browser, made, width, scheme):
    one = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
    one.set_default_timeout(PATIENCE)
    try:
        for address in ("", "#group=0.5.2", "#values"):
            show(one, made, address)
            one.wait_for_timeout(100)
            assert one.evaluate("document.documentElement.scrollWidth") <= width
        dark = one.evaluate("getComputedStyle(document.documentElement).backgroundColor") == "rgb(22, 23, 24)"
        assert dark == (scheme == "dark")
    finally:
        one.close()


def test_landmarks_names_and_print(tab, made):
    show(tab, made)
    assert [tab.locator(tag).count() for tag in ("main", "nav[aria-label]", "header.top", "footer", "h1")] == [1] * 5
    unnamed = "[...document.querySelectorAll('input, select')].filter(e => !e.labels?.length && !e.ariaLabel).map(e => e.id)"
    assert tab.evaluate(unnamed) == []
    assert tab.evaluate("document.documentElement.lang") == "en"
    tab.emulate_media(media="print")
    assert not tab.is_visible("nav") and tab.is_visible("#summary")


@pytest.mark.slow
def test_a_large_run_is_shown_at_once(browser, tmp_path):
    """1,000 steps and 10,000 groups of 5 responses: prints what it measured. Run it alone, on a machine at rest."""
    folder = made_run.make(tmp_path / "run", steps=1000, groups=10, size=5, longer=600)
    began = time.perf_counter()
    pages.write([folder], folder / "report.html")
    wrote, size = time.perf_counter() - began, (folder / "report.html").stat().st_size / 1e6
    one = browser.new_page(viewport={"width": 1280, "height": 900})
    one.set_default_timeout(PATIENCE)
    show(one, folder / "report.html")
    paint = one.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime") / 1000
    ready = one.evaluate("performance.now()") / 1000
    one.click("#to-rollouts")
    counted(one, 10_000)
    filters = {}
    tried = {"from": "500", "least": "1", "reason": "0", "difference": "type", "variance": "differ", "tool": "get_w"}
    fill = "([id, value]) => { document.getElementById(id).value = value; }"
    timed = """async () => {
        const began = performance.now();
        await rollouts.filter();
        return rollouts.list.offsetHeight && performance.now() - began;
    }"""
    for place, value in tried.items():
        one.evaluate(fill, [place, value])
        filters[place] = one.evaluate(timed) / 1000
        one.evaluate(fill, [place, ""])
    search = []
    for word in ("quartz river", "never there"):
        one.evaluate(fill, ["search", word])
        search.append(one.evaluate(timed) / 1000)
    raw = (folder / "rollouts.jsonl").stat().st_size / 1e6
    print(
        f"\nrollouts.jsonl {raw:.0f} MB; made in {wrote:.1f} s; {size:.1f} MB; first paint {paint:.2f} s, curves {ready:.2f} s"
    )
    print("filters", {name: f"{seconds:.3f} s" for name, seconds in filters.items()})
    print(f"first search, which reads all texts, {search[0]:.2f} s; the next {search[1]:.3f} s")
    one.close()
    assert size < 60 and paint < 2 and max(filters.values()) < 0.2
