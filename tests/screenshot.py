"""Draw the pictures of the README that show pages: scroll a page to an element, and save what Chromium shows.

    python tests/screenshot.py lesson.html "#MultiHeadAttention" images/lesson.png
    python tests/screenshot.py story.html body images/explore.png
"""
import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright


def screenshot(page_file, selector, picture, size=(1440, 1372)):
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": size[0], "height": size[1]})
        page.goto(Path(page_file).resolve().as_uri())
        page.wait_for_timeout(3000)         # the model starts
        page.evaluate("selector => document.querySelector(selector).scrollIntoView()", selector)
        page.wait_for_timeout(1000)
        page.screenshot(path=picture)
        browser.close()


if __name__ == "__main__":
    screenshot(*sys.argv[1:])
