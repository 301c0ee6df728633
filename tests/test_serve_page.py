"""The page at / in a real browser: each token in the colour of its depth, and nothing written becomes markup."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import httpx
import pytest
from serving import NAME, served, text_model
from small_models import speaker

from hrm_model.template import prompt
from hrm_model.tokenizer import get_tokenizer

playwright = pytest.importorskip("playwright.sync_api")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine (apt install chromium)")
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage"
).split()
HOSTILE = '<img src=x onerror="document.title=1"><script>document.title=2</script>&amp;\n</div> "done"'


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    profile = tmp_path_factory.mktemp("profile")
    with playwright.sync_playwright() as play:
        context = play.chromium.launch_persistent_context(
            profile, executable_path=BROWSER, headless=True, args=FLAGS, timeout=120_000
        )
        context.set_default_timeout(60_000)
        yield context
        context.close()


@pytest.fixture
def tab(browser):
    """A page, and what went wrong in it."""
    made = browser.new_page()
    made.wrong = []
    made.on("console", lambda message: made.wrong.append(message.text) if message.type == "error" else None)
    made.on("pageerror", lambda error: made.wrong.append(str(error)))
    made.on("dialog", lambda dialog: made.wrong.append("dialog"))
    yield made
    made.close()


def ask(tab, question: str, **options) -> None:
    if options:
        tab.eval_on_selector("details", "details => { details.open = true }")
    for name, value in options.items():
        tab.fill(f"#{name}", str(value))
    tab.fill("#question", question)
    tab.press("#question", "Enter")
    tab.wait_for_function("() => !document.getElementById('send').disabled")


def test_an_answer_comes_token_by_token_in_the_colours_of_its_depth(tab, browser):
    with served(text_model(8, block_size=160)) as (address, _):
        requested = []
        tab.on("request", lambda request: requested.append(request.url))
        tab.goto(address)
        assert tab.title() == NAME and tab.locator("#legend .t").count() == 5
        ask(tab, "Hi", temperature=1.2, max_tokens=40, seed=1)
        asked = {"messages": [{"role": "user", "content": "Hi"}], "temperature": 1.2, "max_tokens": 40}
        asked |= {"top_k": 50, "top_p": 0.95, "seed": 1}
        choice = httpx.post(f"{address}/v1/chat/completions", json=asked, timeout=100).json()["choices"][0]
        assert tab.locator(".answer").inner_text() == choice["message"]["content"].rstrip("\n")
        shown = tab.eval_on_selector_all(".answer .t", "all => all.map(t => [t.textContent, t.className, t.title])")
        assert len(shown) > 20 and len({kind for _, kind, _ in shown}) > 1
        titles = [int(n) for *_, title in shown for n in title.replace(" steps", "").replace(" step", "").split(", ")]
        assert titles == choice["hrm"]["steps"][: len(titles)]
        assert all(kind == f"t d{max(map(int, title.split(' step')[0].split(', ')))}" for _, kind, title in shown)
        colours = tab.eval_on_selector_all("#legend .t", "all => all.map(t => getComputedStyle(t).backgroundColor)")
        assert len(set(colours)) == 5 and "rgba(0, 0, 0, 0)" not in colours, "the policy allows the style"
        assert f"{len(choice['hrm']['steps'])} tokens" in tab.inner_text(".facts")
        assert all(url.startswith((address, "data:")) for url in requested), "nothing else is fetched"
        if folder := os.environ.get("HRM_SCREENSHOTS"):
            tab.screenshot(path=Path(folder) / "serve.png", full_page=True)
        assert tab.wrong == []


def test_what_the_person_or_the_model_writes_is_never_markup(tab):
    question = '"><script>document.title=3</script><b>Hi</b>'
    given = len(prompt([{"role": "user", "content": question}], get_tokenizer()))
    said = get_tokenizer().encode(" " + HOSTILE)
    with served(speaker([0] * (given - 1) + said)) as (address, _):
        tab.goto(address)
        ask(tab, question, max_tokens=len(said), force_steps=2)
        assert tab.text_content(".answer") == HOSTILE and tab.text_content(".user") == question
        assert tab.locator("main img, main script, main b").count() == 0 and tab.title() == NAME
        assert {"t d2"} == set(tab.eval_on_selector_all(".answer .t", "all => all.map(t => t.className)"))
        assert tab.wrong == []
        policy = httpx.get(address).headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
        # should markup ever get in, it does not run
        tab.evaluate(
            "() => { const s = document.createElement('script'); s.text = 'document.title=4'; document.body.append(s) }"
        )
        assert tab.title() == NAME and any("Content Security Policy" in said for said in tab.wrong)


def test_errors_are_shown_stop_stops_and_a_conversation_goes_on(tab):
    with served(text_model(block_size=512), api_key="sesame") as (address, scheduler):
        tab.goto(address)
        ask(tab, "Hi", max_tokens=2)
        assert "API key is missing" in tab.inner_text("#status")
        ask(tab, "Hi", key="sesame", max_tokens=600)
        assert "max_tokens 600 must be an integer in 1..511" in tab.inner_text("#status")
        tab.fill("#max_tokens", "400")
        tab.fill("#question", "Hi")
        tab.press("#question", "Enter")
        tab.wait_for_selector(".answer .t")
        tab.click("#stop")
        tab.wait_for_function("() => !document.getElementById('send').disabled")
        assert tab.inner_text("#status") == "stopped" and not scheduler.counts.finished["length"]
        ask(tab, "More", max_tokens=3)
        assert tab.locator(".answer").count() == 2
        with tab.expect_request("**/v1/chat/completions") as sent:
            ask(tab, "And more", max_tokens=400)  # the oldest turn has to go
        roles = [message["role"] for message in sent.value.post_data_json["messages"]]
        assert roles == ["user", "assistant", "user", "assistant", "user"]
        assert tab.inner_text("#status") in ("", "cut: more tokens allow longer answers")
        tab.click("#clear")
        assert tab.locator(".turn").count() == 0


def test_a_new_conversation_may_begin_while_an_answer_comes(tab):
    with served(text_model(block_size=512)) as (address, _):
        tab.goto(address)
        tab.eval_on_selector("details", "details => { details.open = true }")
        tab.fill("#max_tokens", "400")
        tab.fill("#question", "Old")
        tab.press("#question", "Enter")
        tab.wait_for_selector(".answer .t")
        tab.click("#clear")
        with tab.expect_request("**/v1/chat/completions") as sent:
            ask(tab, "New", max_tokens=3)
        assert sent.value.post_data_json["messages"] == [{"role": "user", "content": "New"}]
        assert tab.locator(".turn").count() == 2 and tab.get_attribute("#status", "class") != "bad"


def test_a_question_that_got_no_answer_is_there_to_be_sent_again(tab):
    """And the page asks for no more tokens than this server gives."""
    with served(text_model(block_size=80)) as (address, _):
        tab.goto(address)
        assert (tab.get_attribute("#max_tokens", "max"), tab.input_value("#max_tokens")) == ("79", "40")
        tab.fill("#question", "Hi")
        tab.eval_on_selector("#temperature", "input => { input.value = '9' }")
        tab.press("#question", "Enter")  # options are closed: what is wrong in them must be said all the same
        tab.wait_for_function("() => document.getElementById('status').textContent")
        assert "temperature 9 must be a number in 0..2" in tab.inner_text("#status")
        ask(tab, "Hi", max_tokens=3, temperature=1)
    ask(tab, "Are you there?")
    assert "cannot be reached" in tab.inner_text("#status") and tab.input_value("#question") == "Are you there?"
    assert tab.locator(".user").count() == tab.locator(".answer").count() == 1


def test_who_reads_above_is_not_taken_down(tab):
    with served(text_model(block_size=512)) as (address, _):
        tab.set_viewport_size({"width": 500, "height": 300})
        tab.goto(address)
        ask(tab, "Hi", max_tokens=120)
        assert tab.evaluate("() => window.scrollY") > 0, "it follows what is written"
        tab.eval_on_selector("details", "details => { details.open = false }")
        tab.fill("#question", "More")
        tab.press("#question", "Enter")
        tab.wait_for_function(
            "() => document.querySelectorAll('.answer:nth-of-type(n+4) .t, .answer ~ .answer .t').length > 5"
        )
        tab.evaluate("() => window.scrollTo(0, 0)")
        tab.wait_for_function("() => !document.getElementById('send').disabled")
        assert tab.evaluate("() => window.scrollY") == 0
