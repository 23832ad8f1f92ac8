"""A run -> a repository on the hub: its weights, the pictures that they drew, the report and a model card.

What is uploaded is written down here, name by name (`contents`). Nothing else of a run's folder ever is: no state, no
cache, no caption, no setting that names a place of this machine. The token is HF_TOKEN's or the stored login's, and in
nothing that is written or printed. What was published before and has not changed is not uploaded again, so that after
any failure the same command goes on.

No torch here: train/__main__.py calls ask() before it imports anything large, and publish() after the last step.
"""

import contextlib
import os
import re
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

from data.common import door, safe
from data.common.disk import naming, sha256_file
from data.common.errors import MachineError, UserError, one_line
from data.common.fields import read_json
from data.common.flags import parse
from data.common.words import many
from infer import told
from infer.card import Facts, card
from infer.loras import SAVE
from lora.contents import look

SECONDS = 120  # that the hub may take for an answer
SAMPLES = 4  # pictures of the training's end
# What may lie in a repository because an earlier call put it there, and goes when the run has it no more.
SAMPLE = re.compile(r"(\d{6,})_(\d+)\.png")
OURS = re.compile(
    rf"lora-best\.safetensors|compare/(grid\.png|report\.html|{told.PICTURE.pattern})|samples/{SAMPLE.pattern}"
)
HASH = "sshs_model_hash"  # in a file's metadata: the sha256 of its tensors
PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Repository:
    """A repository that takes what is published, as whoever the token is of."""

    id: str  # USER/NAME
    api: object = field(repr=False)  # huggingface_hub.HfApi, which knows the token
    private: bool = False

    @property
    def url(self):
        return f"{self.api.endpoint}/{self.id}"


def ask(hub_model_id, private):
    """-> the Repository of that id, which is made where it is not there.

    Raises UserError when there is no token, the hub refuses it, or it may not write there; MachineError when the hub
    cannot be asked.
    """
    from huggingface_hub import HfApi, constants, get_session, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(hub_model_id)
    except HFValidationError:
        raise UserError(
            f"--hub_model_id {hub_model_id}: not a name that the hub takes; USER/NAME of letters, digits, - _ and ."
        ) from None
    if constants.HF_HUB_OFFLINE:
        raise UserError("HF_HUB_OFFLINE is set, and nothing can be published without network; unset it")
    again = "run the same command again"
    with _in_words(hub_model_id, again):
        token = get_token()
        if not token:
            raise UserError(
                "publishing needs a token of the hub that may write (https://huggingface.co/settings/tokens): set "
                "HF_TOKEN, or log in once with: hf auth login"
            )
        if not re.fullmatch(r"[!-~]+", token):  # an error of the HTTP library would show it
            raise UserError(f"{_token()} has characters that no token has; copy it again")
        api = HfApi(token=token)
        get_session().timeout = SECONDS
        user = api.whoami()["name"]
        name = hub_model_id if "/" in hub_model_id else f"{user}/{hub_model_id}"
        api.create_repo(name, private=private or None, exist_ok=True)
        api.auth_check(name, write=True)  # one of somebody else is there as well
        if private and not api.model_info(name, timeout=SECONDS).private:
            raise UserError(
                f"--private: {api.endpoint}/{name} is there and public; change it there, or leave the flag out"
            )
    return Repository(name, api, private)


def publish(repository, run):
    """Upload what `contents` names in one commit; what has not changed is not sent. `run` is the run's folder."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    files, api = contents(run, repository.id), repository.api
    private = " --private" if repository.private else ""
    again = f"run python -m infer.publish {shlex.quote(str(run))} --hub_model_id {repository.id}{private}"
    with _in_words(repository.id, again):
        before = api.model_info(repository.id, timeout=SECONDS)
        there = [file.rfilename for file in before.siblings or ()]
        operations = [CommitOperationAdd(path, content) for path, content in files.items()]
        operations += [CommitOperationDelete(path) for path in there if OURS.fullmatch(path) and path not in files]
        print(f"hub: {many(len(files), 'file')} to {repository.url}", flush=True)
        commit = api.create_commit(repository.id, operations, commit_message="Weights, pictures and model card")
    print(
        f"{repository.url}: {'nothing has changed since the last time' if commit.oid == before.sha else 'published'}",
        flush=True,
    )


def contents(run, repository):
    """All that is published: {path in the repository: bytes, or a Path of this machine}. repository: USER/NAME

    Pictures are published when report.json says that these weights drew them. Raises UserError naming what is missing
    or not what it should be.
    """
    weights = weights_of(run)
    final = weights[run / "lora.safetensors"]
    files = {path.name: path for path in weights}
    facts = dict(repository=repository, run=run.resolve().name, weights=final, step=step_of(run, final))
    facts |= dict(training=told.training(run))
    digests = {path.name: sha256_file(path) for path in weights}
    if report := report_of(run, digests.values()):
        folder = run / "compare"
        names = [name for row in report["rows"] for name in row["pictures"] if told.PICTURE.fullmatch(name)]
        files |= {f"compare/{name}": _png(folder / name) for name in [*names, "grid.png"]}
        if os.path.lexists(folder / "report.html"):
            files |= _page(folder / "report.html", run)
        rows = [row for row in report["rows"] if row["lora"] and row["lora"]["sha256"] == digests["lora.safetensors"]]
        row = min(rows, key=lambda row: abs(row["scale"] - 1), default=dict(pictures=[]))  # as it was trained
        gallery = zip(report["prompts"], (f"compare/{name}" for name in row["pictures"]))
        facts |= dict(gallery=tuple(shown for shown in gallery if shown[1] in files))
        facts |= dict(command=report.get("command"), scores=told.scores(folder))
    files |= {f"samples/{path.name}": _png(path) for path in last_samples(run / "samples")}
    files["README.md"] = card(Facts(files=tuple(files), **facts)).encode()
    return files


def weights_of(run):
    """{path: what is in it} of lora.safetensors and, where there is one, lora-best.safetensors."""
    run = Path(run)
    if not (run / "lora.safetensors").exists():
        raise UserError(
            f"{run / 'lora.safetensors'}: not there; run python -m train --output_dir {run} to its end first"
        )
    best = run / "lora-best.safetensors"
    return {path: look(path) for path in (run / "lora.safetensors", best) if path.exists()}


def step_of(run, weights):
    """After how many steps these weights were saved, told by the save that is equal to them; None where it is gone."""
    for path in sorted(run.glob("lora-*.safetensors")):
        if (name := SAVE.fullmatch(path.name)) and look(path).metadata.get(HASH) == weights.metadata.get(HASH):
            return int(name[1])
    return None


def report_of(run, digests):
    """compare/report.json where it tells of weights with one of these sha256; None, and why is said, where not."""
    path, advice = run / "compare" / "report.json", f"run python -m infer --output_dir {run} again"
    if not path.exists():
        print(f"no pictures: {path} is not there; python -m infer --output_dir {run} makes them")
        return None
    report = read_json(path, advice)
    try:
        drawn_by = {row["lora"]["sha256"] for row in report["rows"] if row["lora"]}
        right = all(isinstance(name, str) for row in report["rows"] for name in row["pictures"])
        right &= all(isinstance(prompt, str) for prompt in [*report["prompts"], *report.get("unrelated_prompts", ())])
        right &= all(isinstance(row["scale"], (int, float)) for row in report["rows"])
    except (LookupError, TypeError):
        right = False
    if not right:
        raise UserError(f"{path}: damaged, or of an earlier version; {advice}")
    if not drawn_by & set(digests):
        print(f"no pictures: those in {path.parent} are of other weights; {advice}, then publish again")
        return None
    return report


def last_samples(folder):
    """Paths of the first pictures that were drawn at the training's last save."""
    named = [(name, path) for path in folder.glob("*.png") if (name := SAMPLE.fullmatch(path.name))]
    found = sorted((int(name[1]), int(name[2]), path) for name, path in named)
    return [path for step, _, path in found if step == found[-1][0]][:SAMPLES]


def _content(path):
    """The bytes of a file that a report names. Raises UserError when it is not there or not a file."""
    if not os.path.lexists(path):
        raise UserError(f"{path}: not there, though its report names it; draw again with python -m infer")
    door.look_at(path, "file")
    with naming(path):
        return path.read_bytes()


def _page(path, run):
    """{path in the repository: bytes} of a report; without one that tells where on this machine something lies."""
    content = _content(path)
    places = [str(place) for place in (run.resolve(), Path(os.path.expanduser("~")))]
    if found := [place for place in places if len(place) > 1 and place.encode() in content]:
        print(f"not published: {path} names {found[0]}; draw again with python -m infer and relative paths")
        return {}
    return {f"compare/{path.name}": content}


def _png(path):
    """The bytes of a picture. Raises UserError when it is something else."""
    content = _content(path)
    if not content.startswith(PNG):
        raise UserError(f"{path}: not a PNG, and nothing else is published as a picture; draw again")
    return content


def _token():
    """Where the token comes from, in the order in which huggingface_hub looks."""
    names = (name for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN") if os.environ.get(name))
    return next(names, "the stored login's token")


@contextlib.contextmanager
def _in_words(repository, again):
    """What the hub answers, or that it does not, as the error that it is to a user. again: what to do later."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code
        said = one_line(error.server_message or error.response.reason_phrase, 200)
        if status == 401:
            raise UserError(
                f"the hub refuses {_token()} ({said}); make one that may write at https://huggingface.co/settings/tokens"
            ) from None
        if status in (402, 403, 404):
            raise UserError(
                f"{repository}: {_token()} may not write there: {said}; name a repository of your own, or use a token "
                "that may write to this one"
            ) from None
        raise MachineError(f"{repository}: the hub answered {status}: {said}; nothing is lost, {again}") from None
    except (HTTPError, OSError, RuntimeError, ValueError) as error:  # the last two are what a failed upload raises
        if isinstance(error, OSError) and error.errno:
            raise  # a file of this machine
        reason = one_line(error, 200) or type(error).__name__
        raise MachineError(f"{repository}: the hub was not reached: {reason}; nothing is lost, {again}") from None


def main(argv):
    settings = parse("infer.publish", argv)
    run = door.can_be_written(settings.run, "RUN")
    weights_of(run)
    with door.hold(run, "RUN"):
        publish(ask(settings.hub_model_id, settings.private), run)


if __name__ == "__main__":
    safe.run(main, sys.argv[1:])
