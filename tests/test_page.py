"""The web page as a person meets it, in Chromium: a real server, a real model. One server and one browser."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from browser import Browser, Page, find_chromium
from serving import CHAT, Server, until

ANSWERED = "document.querySelector('.turn:last-child .answer[aria-busy=false]')"
READY = "document.querySelector('#state').dataset.state === 'ready'"
STREAM = {"content-type": "text/event-stream"}


@pytest.fixture(scope="module")
def server(model_path: Callable[[str], Path]) -> Iterator[Server]:
    with Server(model_path("smollm2")) as running:
        yield running


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = find_chromium()
    if program is None:
        advice = "the web page was not run: no Chromium here; on Debian or Ubuntu: apt install chromium"
        assert not os.environ.get("CI"), advice
        pytest.skip(advice)
    with Browser(tmp_path_factory.mktemp("chromium"), program) as running:
        yield running


Open = Callable[..., Page]


@pytest.fixture
def opened(browser: Browser, server: Server) -> Iterator[Open]:
    """Opens the page. Whatever a test did, nothing was fetched from elsewhere, and no script failed or was refused."""
    pages: list[Page] = []

    def open_page(path: str = "/", **how: Any) -> Page:
        page = browser.page(server.facts["url"] + path, **how)
        page.wait(READY)
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        page.run("0")
        elsewhere = [url for url in page.requests if not url.startswith((server.facts["url"], "data:"))]
        assert not elsewhere
        assert page.problems == []
        page.close()


def ask(page: Page, text: str) -> None:
    page.click("#prompt")
    page.type(text)
    page.press("Enter")


def event(**fields: Any) -> str:
    return f"data: {json.dumps(fields)}\n\n"


def said(text: str, **last: Any) -> bytes:
    """A stream that says `text`, as a server would."""
    chunks = event(choices=[{"index": 0, "delta": {"content": text}, "finish_reason": None}])
    return (
        chunks + event(choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}], **last) + "data: [DONE]\n\n"
    ).encode()


def test_a_question_is_answered_and_every_stage_drawn(browser: Browser, opened: Open, server: Server) -> None:
    page = opened()
    page.choose("#deadline", 13)  # 10 s
    ask(page, "What is the capital of France?")
    page.wait(ANSWERED)
    body = {"model": "m", "messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0}
    whole = server.json(CHAT, {**body, "max_tokens": 256})[1]["choices"][0]["message"]["content"]
    assert page.text(".answer .text").split() == whole.split()
    names = page.run("[...document.querySelectorAll('.waterfall .name')].map((one) => one.textContent)")
    assert names[:4] == ["Tokenize", "Queue", "Prefill", "Decode"] and names[-1] == "Slack"
    assert page.count(".waterfall .deadline") == 1
    assert "to spare" in page.text("summary")
    page.wait("document.querySelector('.card .big').textContent !== '–'")  # the live view has seen the first token


def test_the_conversation_goes_on_and_lives_in_the_tab_alone(browser: Browser, opened: Open) -> None:
    page = opened()
    page.choose("#system", "Answer in one word.")
    page.choose("#max-tokens", 6)
    ask(page, "Name a colour.")
    page.wait(ANSWERED)
    ask(page, "And another?")
    page.wait(f"document.querySelectorAll('.turn').length === 2 && {ANSWERED}")
    sent = json.loads(page.bodies[-1])
    assert [message["role"] for message in sent["messages"]] == ["system", "user", "assistant", "user"]
    assert sent["max_tokens"] == 6 and "deadline_ms" not in sent
    assert "colour" not in page.run("JSON.stringify([localStorage, sessionStorage])")
    page.click(".turn:last-child .again")
    page.wait(ANSWERED)
    assert page.count(".turn") == 2 and json.loads(page.bodies[-1]) == sent
    page.click("#new")
    assert page.count(".turn") == 0 and page.text("#welcome h2")


def test_stop_ends_the_answer_here_and_in_the_server(browser: Browser, opened: Open, server: Server) -> None:
    for stop in ("click", "key"):
        page = opened()
        gone = server.metric("requests_failed_total", reason="client_gone")
        page.choose("#max-tokens", 4000)
        page.choose("#temperature", 0)  # of which this question's answer never ends
        ask(page, "Write a very long story about the sea, in a hundred chapters.")
        page.wait("document.querySelector('.answer .text')?.innerText.length > 20")
        page.click("#stop") if stop == "click" else page.press("Escape")
        page.wait(ANSWERED)
        assert page.text(".note") == "Stopped" and page.text(".answer .text")
        until(lambda gone=gone: server.metric("requests_failed_total", reason="client_gone") == gone + 1)
        until(lambda: server.metric("num_requests_active") == 0)


def test_a_refusal_is_shown_with_its_forecast_and_a_way_out(browser: Browser, opened: Open) -> None:
    page = opened()
    error = {
        "message": "cannot be in time",
        "code": "deadline_unmeetable",
        "type": "server_error",
        "predicted_ms": 412.4,
    }
    page.answer(CHAT, 503, {"content-type": "application/json"}, json.dumps({"error": error}).encode())
    page.choose("#deadline", 0)
    ask(page, "Hello!")
    page.wait(ANSWERED)
    text = page.text(".refusal")
    assert "Refused before any work" in text and "412 ms" in text and "deadline_unmeetable" in text
    assert page.run("document.querySelector('meter.predicted').value") == 412.4
    page.answer(CHAT, 200, STREAM, said("Hi."))
    page.click(".refusal button")
    page.wait(ANSWERED)
    assert page.text(".answer .text") == "Hi."
    assert json.loads(page.bodies[-1])["deadline_ms"] == 500  # the slider's next after 412.4 and a fifth
    page.problems.clear()  # Chromium writes each 503 into its log


def test_an_answer_that_breaks_off_says_so(browser: Browser, opened: Open) -> None:
    page = opened(language="zh-CN")
    beginning = json.dumps(said("Once upon").decode().partition("data: [DONE]")[0])
    page.run(
        "globalThis.real = fetch, globalThis.fetch = (path, how) => path !== 'v1/chat/completions' ? real(path, how) :"
        "Promise.resolve(new Response(new ReadableStream({ start(body) {"
        f"body.enqueue(new TextEncoder().encode({beginning}));"
        "setTimeout(() => body.error(new TypeError('network error')), 50); } })))"
    )
    ask(page, "Tell me a story.")
    page.wait(ANSWERED)
    assert page.text(".text") == "Once upon" and page.text(".failure").split() == ["回答中断", "无法连接服务器"]
    assert page.run("document.querySelector('#announce').textContent") == ""  # the alert says it
    page.call("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=-1, uploadThroughput=-1)
    page.wait("document.querySelector('#load-note').textContent === '无法读取指标：无法连接服务器'")
    page.problems.clear()  # Chromium writes each request that fails into its log


def test_text_of_a_model_is_text(browser: Browser, opened: Open) -> None:
    page = opened()
    hostile = '<img src=x onerror="window.hit=1"><script>window.hit=1</script> [x](javascript:window.hit=1)'
    marked = "**bold** and `code <b>` *slanted*, 2*3*4\n\n1. one\n2. two\n   - in two\n\n```html\n<i>**raw**</i>\n```"
    page.answer(CHAT, 200, STREAM, said(f"{hostile}\n\n{marked}"))
    ask(page, "<b>me</b>")
    page.wait(ANSWERED)
    assert page.text(".question p") == "<b>me</b>"
    assert hostile in page.text(".text")
    assert page.count(".text img, .text script, .text a, .text b, .question b") == 0
    assert page.run("window.hit") is None
    assert page.text(".text strong") == "bold" and page.text(".text em") == "slanted"
    assert page.text(".text p code") == "code <b>" and page.text(".text pre code") == "<i>**raw**</i>"
    assert page.count(".text > ol > li") == 2 and page.text(".text ol li:last-child ul li") == "in two"
    blocks = '```py title="x"\n**x**\n```\n\n| a | b |\n|--|:-:|\n| <i> | **c** |\n\nسلام!\n\n- שלום'
    page.answer(CHAT, 200, STREAM, said(blocks))
    ask(page, "سلام")
    page.wait(f"document.querySelectorAll('.turn').length === 2 && {ANSWERED}")
    assert page.text(".turn:last-child .text pre code") == "**x**"
    cells = page.run("[...document.querySelectorAll('.text :is(th, td)')].map((cell) => cell.innerText)")
    assert cells == ["a", "b", "<i>", "c"] and page.text(".text td strong") == "c"
    blocks = "[...document.querySelectorAll('.turn:last-child :is(p, ul, pre)')]"
    assert page.run(blocks + ".map((block) => getComputedStyle(block).direction)") == ["rtl", "ltr", "rtl", "rtl"]


def test_it_speaks_the_browsers_language_and_the_chosen_one(browser: Browser, opened: Open) -> None:
    page = opened(language="zh-CN")
    assert page.text("#send") == "发送" and page.run("document.documentElement.lang") == "zh-Hans"
    page.answer(CHAT, 200, STREAM, said("Hello."))
    ask(page, "你好")
    page.wait(ANSWERED)
    assert page.text(".turn .copy") == "复制"
    page.choose("#language", "en")
    assert page.text("#send") == "Send" and page.text(".turn .copy") == "Copy"
    page.go(page.run("location.href"))
    assert page.text("#send") == "Send"
    missing = page.run(
        "import('/page/words.js').then(({ WORDS }) => Object.keys(WORDS.en).filter((name) => !WORDS.zh[name])"
        ".concat([...document.querySelectorAll('[data-word], [data-word-label], [data-word-hint]')]"
        ".flatMap((node) => Object.values(node.dataset)).filter((name) => !WORDS.en[name])))"
    )
    assert missing == []


def test_every_control_has_a_name_and_the_keyboard_reaches_it(browser: Browser, opened: Open) -> None:
    page = opened()
    tree = page.call("Accessibility.getFullAXTree")["nodes"]
    controls = {"button", "slider", "textbox", "combobox", "spinbutton", "link"}
    found = [node for node in tree if node.get("role", {}).get("value") in controls and not node.get("ignored")]
    assert len(found) >= 12
    assert [node for node in found if not node.get("name", {}).get("value")] == []
    reached = set()
    for _ in range(40):
        page.press("Tab")
        reached.add(page.run("document.activeElement.id"))
    assert {"deadline", "priority", "prompt", "send", "new", "theme", "language", "model", "system", "key"} <= reached
    page.run("document.querySelector('#deadline').focus()")
    page.press("Home")
    assert page.run("document.querySelector('#deadline').getAttribute('aria-valuetext')") == "50 ms"


def test_keys_of_an_input_method_are_its_own_and_the_focus_is_kept(browser: Browser, opened: Open) -> None:
    page = opened()
    page.click("#prompt")
    page.type("Write a very long story about the sea, in a hundred chapters.")
    press = "document.querySelector('#prompt').dispatchEvent(new KeyboardEvent('keydown', {{ bubbles: true, {} }}))"
    for sign in ("isComposing: true", "keyCode: 229"):  # Safari's Enter that ends composing says so by its code alone
        page.run(press.format(f"key: 'Enter', {sign}"))
    assert page.count(".turn") == 0
    page.choose("#max-tokens", 4000)
    page.choose("#temperature", 0)  # of which this question's answer never ends
    page.run("document.querySelector('#send').focus()")
    page.press("Enter")
    page.wait("document.querySelector('.answer .text')?.innerText.length > 20")
    assert page.run("document.activeElement.id") == "log"  # its button is gone
    page.run(press.format("key: 'Escape', isComposing: true"))
    assert page.run("document.querySelector('#stop').hidden") is False
    page.run("document.querySelector('#stop').focus()")
    page.press("Enter")
    page.wait(ANSWERED)
    page.wait("document.activeElement.id === 'log'")
    assert page.run("document.querySelector('#announce').textContent") == "Stopped"


def test_without_storage_the_page_works(browser: Browser, opened: Open) -> None:
    page = opened()
    for storage in (
        "for (const name of ['localStorage', 'sessionStorage'])"
        "Object.defineProperty(window, name, { get() { throw new DOMException('denied', 'SecurityError'); } })",
        "Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError'); }",
    ):
        script = page.call("Page.addScriptToEvaluateOnNewDocument", source=storage)["identifier"]
        page.go(page.run("location.href"))
        page.wait(READY)
        page.choose("#language", "zh")
        page.choose("#deadline", 0)
        assert page.text("#send") == "发送" and page.text("#deadline-text") == "50 ms"
        page.call("Page.removeScriptToEvaluateOnNewDocument", identifier=script)


def test_a_model_stays_chosen_and_a_key_is_asked_for(browser: Browser, opened: Open) -> None:
    page = opened()

    def models(*names: str) -> None:
        listed = {"data": [{"id": name} for name in names]}
        page.answer("/v1/models", 200, {"content-type": "application/json"}, json.dumps(listed).encode())
        page.choose("#key", "密\u200bk")  # looks at once
        page.wait(f"document.querySelectorAll('#model option').length === {len(names)}")

    assert page.run("import('/page/settings.js').then((settings) => settings.key())") == ""
    models("m", "other")
    assert page.run("import('/page/settings.js').then((settings) => settings.key())") == "k"
    page.run("for (let last = setTimeout(() => 0); last; last--) clearTimeout(last)")  # it looks for nothing by itself
    page.choose("#model", "other")
    page.wait("document.querySelector('#state-text').textContent === 'other · ready'")
    models("m", "more", "other")
    assert page.run("document.querySelector('#model').value") == "other"
    error = {"error": {"message": "the API key is not valid", "code": "invalid_api_key"}}
    page.answer(CHAT, 401, {"content-type": "application/json"}, json.dumps(error).encode())
    page.size(380, 700)
    ask(page, "Hello!")
    page.wait("document.activeElement.id === 'key'")  # shown for it, where it lies behind a button
    page.problems.clear()


def test_light_dark_and_narrow(browser: Browser, opened: Open) -> None:
    page = opened(scheme="dark")
    colour = "getComputedStyle(document.body).backgroundColor"
    dark = page.run(colour)
    page.scheme("light")
    assert page.run(colour) != dark
    page.click("#theme")
    page.click("#theme")
    assert page.run(colour) == dark and page.text("#theme") == "Theme: dark"
    placeholder = "getComputedStyle(document.querySelector('#prompt'), '::placeholder').color"
    assert page.run(placeholder) == page.run("getComputedStyle(document.querySelector('#keys')).color")
    page.size(320, 256)
    assert page.run("document.querySelector('#log').clientHeight") >= 100
    page.size(380, 700)
    timings = {name: 9.0 for name in ("queue_ms", "tokenize_ms", "first_token_ms", "decode_ms", "total_ms")}
    page.answer(CHAT, 200, STREAM, said("Hi.", timings=timings))
    ask(page, "Hello!")
    page.wait(ANSWERED)
    assert page.run("document.querySelector('.waterfall .name').getBoundingClientRect().height") > 11
    assert page.run("document.documentElement.scrollWidth") <= 380
    assert page.run("getComputedStyle(document.querySelector('#side')).display") == "none"
    page.click("#side-open")
    assert page.run("getComputedStyle(document.querySelector('#side')).display") != "none"


def test_the_figures_are_those_of_prometheus(browser: Browser, opened: Open) -> None:
    page = opened()
    lines = 'h_bucket{{a="x",le="0.1"}} {}\nh_bucket{{a="x",le="0.2"}} {}\nh_bucket{{a="x",le="+Inf"}} {}\n'
    lines += '# HELP c_total x\nc_total{{a="x"}} {}\nc_total{{a="y,}}"}} {}\n'
    before, now = lines.format(4, 4, 5, 3, 4), lines.format(6, 12, 15, 5, 4)
    found = page.run(
        f"import('/page/metrics.js').then((m) => {{"
        f"const a = m.parse({json.dumps(before)}), b = m.parse({json.dumps(now)});"
        "return [m.growth(b, a, 'c_total'), m.growth(a, b, 'c_total'), m.quantile(b, a, 'h', 0.5),"
        "m.quantile(b, a, 'h', 0.99), m.quantile(a, a, 'h', 0.5), b.most.get('c_total')]; })"
    )
    assert found == [2, 7, pytest.approx(0.1 + 0.1 * (5 - 2) / (8 - 2)), 0.2, None, 5]  # of ten: 2, 6 and 2


def test_figures_from_before_a_gap_are_not_of_the_last_minute(browser: Browser, opened: Open) -> None:
    found = opened().run(
        "import('/page/load.js').then(({ Load }) => { const load = new Load(document.createElement('div'),"
        "document.createElement('p'), () => ''), figures = { values: new Map(), most: new Map(), buckets: new Map() };"
        "const first = [['millis:time_to_first_token_seconds', [[0.1, 9], [Infinity, 9]]]];"
        "return [0, 1000, 3600000].map((at) => { load.take({ ...figures, buckets: new Map(first), at });"
        "return [load.readings.length, load.lines.get('Tokens').length, load.figures.First.big()]; }); })"
    )
    assert found == [[1, 1, "–"], [2, 2, "–"], [1, 1, "–"]]


def test_files_are_asked_for_again_only_when_they_changed(server: Server) -> None:
    status, headers, data = server.ask("/")
    assert status == 200 and headers["content-type"] == "text/html; charset=utf-8"
    assert headers["cache-control"] == "no-cache" and b"<title>Millis" in data
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    status, again, data = server.ask("/", headers={"if-none-match": f'"other", W/{headers["etag"]}'})
    assert status == 304 and data == b"" and again["etag"] == headers["etag"]
    assert server.ask("/page/app.js")[1]["content-type"] == "text/javascript; charset=utf-8"
    for path in ("/page/", "/page/__init__.py", "/page/../web.py", "/page/%2e%2e/web.py", "/page/nothing.js"):
        assert server.ask(path)[0] == 404
