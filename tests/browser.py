"""A real headless browser through the W3C WebDriver protocol, which is JSON over HTTP: chromedriver, and no package."""

import base64
import contextlib
import json
import re
import shutil
import subprocess
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"]
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # by this key the protocol names an element
KEYS = dict(Enter="\ue007", Escape="\ue00c", ArrowLeft="\ue012", ArrowUp="\ue013", ArrowRight="\ue014")
KEYS |= dict(ArrowDown="\ue015", Tab="\ue004")


class Browser:
    """One page at a time."""

    def __init__(self, address, profile):
        self.address = address
        options = dict(binary=CHROMIUM, args=[*FLAGS, f"--user-data-dir={profile}"])
        logs = {"goog:loggingPrefs": dict(browser="ALL", performance="ALL")}
        capabilities = dict(browserName="chrome", **{"goog:chromeOptions": options}, **logs)
        started = self._call("POST", "/session", dict(capabilities=dict(alwaysMatch=capabilities)))
        self.address += f"/session/{started['sessionId']}"
        self._call("POST", "/url", dict(url="about:blank"))  # instead of its own page for new tabs

    def _call(self, method, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with _opener.open(request, timeout=60) as response:
                return json.load(response)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path}: {error.read().decode()}") from None

    def open(self, path):
        """Open a file. What was logged before is forgotten."""
        self.logged("browser"), self.logged("performance")
        self._call("POST", "/url", dict(url=Path(path).resolve().as_uri()))

    def run(self, script, *arguments):
        """The value of a JavaScript function's body."""
        return self._call("POST", "/execute/sync", dict(script=script, args=list(arguments)))

    def devtools(self, command, **parameters):
        return self._call("POST", "/goog/cdp/execute", dict(cmd=command, params=parameters))

    def click(self, selector):
        element = self._call("POST", "/element", dict(using="css selector", value=selector))[ELEMENT]
        self._call("POST", f"/element/{element}/click", {})

    def press(self, *names):
        """Press and release each key, given by its name in KEYS."""
        actions = [dict(type=kind, value=KEYS[name]) for name in names for kind in ("keyDown", "keyUp")]
        self._call("POST", "/actions", dict(actions=[dict(type="key", id="keyboard", actions=actions)]))

    def size(self, width, height):
        self.devtools(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def scheme(self, name):
        """ "dark" or "light" """
        features = [dict(name="prefers-color-scheme", value=name)]
        self.devtools("Emulation.setEmulatedMedia", features=features)

    def logged(self, kind):
        """What was logged since the last call: "browser" is the console, "performance" has the network."""
        return self._call("POST", "/se/log", dict(type=kind))

    def requested(self):
        """The addresses that were asked for since the last call, data URIs left out."""
        events = [json.loads(entry["message"])["message"] for entry in self.logged("performance")]
        sent = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
        return [params["request"]["url"] for params in sent if not params["request"]["url"].startswith("data:")]

    def screenshot(self, path):
        """What is in sight, as PNG."""
        Path(path).write_bytes(base64.b64decode(self._call("GET", "/screenshot")))

    def quit(self):
        self._call("DELETE", "")


_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the driver is on this machine


@contextlib.contextmanager
def browser():
    """A started browser, which ends with the block."""
    with tempfile.TemporaryDirectory() as profile:
        driver = subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, text=True, stderr=subprocess.STDOUT)
        try:
            port = next(found[1] for line in driver.stdout if (found := re.search(r"on port (\d+)\.", line)))
            page = Browser(f"http://127.0.0.1:{port}", profile)
            try:
                yield page
            finally:
                page.quit()
        finally:
            driver.terminate()
            driver.wait()
            driver.stdout.close()
