"""`kvernctl report` over a real kvernd under load; the page is opened in a real browser."""

import os
import re
import subprocess
import threading

import pytest

from load import Load

BROWSER_SECONDS = 120


@pytest.fixture(scope="module")
def pages(daemon, tmp_path_factory):
    """Two pages: since a saved reading, and over a few seconds of load."""
    folder = tmp_path_factory.mktemp("pages")
    before = folder / "before.txt"
    before.write_text(daemon.get("/metrics").text)
    load = Load(daemon.address, chunks=8)
    ended = threading.Event()

    def work() -> None:
        prompt = 0
        while not ended.is_set():
            load.store(prompt)
            load.load(prompt)
            load.load(1_000_000 + prompt)  # never stored
            prompt += 1

    thread = threading.Thread(target=work)
    thread.start()
    try:
        daemon.wait_metric("kvern_demotions_total", lambda value: value > 0)
        daemon.ctl("report", "--for", "5", "--output", str(folder / "live.html"))
        daemon.ctl("report", "--since", str(before), "--output", str(folder / "since.html"))
    finally:
        ended.set()
        thread.join()
        load.close()
    return {name: folder / f"{name}.html" for name in ("live", "since")}


def opened(page, *arguments: str) -> tuple[str, str]:
    """The document as the browser made it, and what it had to say."""
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0"]
    home = page.parent / "browser"
    done = subprocess.run(
        [*command, f"--user-data-dir={home}", *arguments, f"file://{page}"],
        capture_output=True,
        text=True,
        timeout=BROWSER_SECONDS,
        env={**os.environ, "HOME": str(page.parent)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@pytest.mark.parametrize("name", ["live", "since"])
def test_a_browser_finds_all_sections_and_complains_about_nothing(pages, name):
    document, said = opened(pages[name], "--dump-dom")
    titles = re.findall(r"<h2>(.*?)</h2>", document)
    wanted = ["Advice", "Bytes by quality step", "Distribution of errors", "Tiers", "How long it took"]
    assert [title for title in titles if title in wanted] == wanted
    assert ("Prompt tokens a second" in titles) == (name == "live")
    assert "CONSOLE" not in said, said
    assert "No chunk stepped down" not in document and "<td>nvme</td>" in document
    assert document.count("<svg") >= (3 if name == "live" else 2)
    assert not re.search(r"\b(nan|inf)\b", document, re.IGNORECASE)


def test_the_console_check_sees_errors(tmp_path):
    page = tmp_path / "broken.html"
    page.write_text("<!DOCTYPE html><title>x</title><script>nothing.here()</script>")
    assert "CONSOLE" in opened(page, "--dump-dom")[1]


@pytest.mark.parametrize("name", ["live", "since"])
def test_the_page_needs_nothing_from_elsewhere(pages, name):
    text = pages[name].read_text()
    assert not re.search(r"https?://|<script|<link(?! rel=\"icon\" href=\"data:,\")|@import|url\(", text)
    assert "prefers-color-scheme: dark" in text


def test_its_figures_are_those_of_the_metrics(daemon, pages):
    text = pages["since"].read_text()
    share = re.search(r"<b>([\d.]+) %</b><span>of [\d.]+[kM]? prompt tokens were found", text)
    asked, found = daemon.metric("kvern_requested_tokens_total"), daemon.metric("kvern_hit_tokens_total")
    # Half of the look-ups were for prompts that nobody stored; the last ones came after the page was written.
    assert share and abs(float(share[1]) - 100 * found / asked) < 5


def test_a_file_that_is_no_reading_is_refused_in_a_sentence(daemon, tmp_path):
    wrong = tmp_path / "wrong.txt"
    wrong.write_text("<html>\n")
    command = daemon.start_ctl("report", "--since", str(wrong), "--output", str(tmp_path / "never.html"))
    output, _ = command.communicate(timeout=60)
    assert command.returncode == 2 and "wrong.txt: line 1 is no sample" in output
    assert not (tmp_path / "never.html").exists()
