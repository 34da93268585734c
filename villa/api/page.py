"""A page in the browser on which a trained model answers questions, and an adversary tries to change its answers."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from PIL import Image

from villa.analysis.pictures import View, draw_movement, draw_words
from villa.api.predictor import Predictor, from_pretrained
from villa.datasets.base import TaskDataset
from villa.engine.adversary import points_of
from villa.errors import ConfigError, DataError, VillaError, one_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Largest perturbation that the page offers, relative to the embedding, and the step between sizes.
_LARGEST, _STEP = 0.5, 0.01
_NAMES = {"text": "Text", "image": "Image", "both": "Both"}
_INTRODUCTION = """\
# {name}

A `{model}` model trained with `{trainer}`. Ask a question, then let an adversary perturb the embeddings of the text, of
the image or of both: it looks for the perturbation of the chosen size that lowers the answer's score most (PGD).
"""


class Shown(NamedTuple):
    """What the page shows about one question.

    Attributes:
        answers: the best answers with their scores.
        attacked: those under attack; None without one.
        change: what the attack changes, in words.
        attention: picture of the attention; None if the model returns none.
        moved: picture of what the adversary moves; None without one.
    """

    answers: dict[str, float]
    attacked: dict[str, float] | None
    change: str
    attention: Image.Image | None
    moved: Image.Image | None


class Demo:
    """The page of one model.

    Args:
        model: the model.

    Attributes:
        regions: what the model sees: ``none``, ``features`` (of files), or images (``grid``, ``pixels``).
        modalities: what can be attacked.

    Raises:
        ConfigError: its data set answers no free questions.
    """

    def __init__(self, model: Predictor) -> None:
        data = model.parts.data
        if type(data).requests is TaskDataset.requests:
            raise ConfigError(
                f"dataset '{model.parts.config.dataset.name}' answers no free questions, which a page asks; give a "
                "model that was trained on data of your own (dataset=jsonl) or on easy_vqa"
            )
        self.model = model
        self.regions = str(getattr(getattr(data, "vocabulary", None), "regions", "features"))
        try:
            points = [*points_of(model.parts, "both")]
        except ConfigError:
            points = []
        self.modalities: list[str] = [name for name in ("text", "image") if name in points]
        self.modalities += ["both"] if len(self.modalities) == 2 else []
        self._asked: SimpleQueue[tuple[Future[Shown], tuple[Any, ...]]] = SimpleQueue()

    def show(self, image: Any, text: str | None, radius: float, modality: str | None) -> Shown:
        """Answer a question, with and without an attack.

        Args:
            image: as for ``Predictor.predict``.
            text: the question.
            radius: size of the perturbation; 0 for no attack.
            modality: one of ``modalities``.

        Raises:
            VillaError: something is missing, or cannot be used.
        """
        if not (text or "").strip():
            raise DataError("there is no question; write one")
        if image is None and self.regions != "none":
            raise DataError("there is no image; choose one")
        given = {"image": image, "text": str(text).strip()}
        view = self._view(given)
        if not radius or modality is None:
            return Shown(self.model.scores(**given), None, "", _drawn(view), None)
        found = self.model.attack(**given, radius=radius, modality=modality)
        moved = None if view is None else _picture(draw_movement(replace(view, movement=found.movement)))
        return Shown(dict(found.before), dict(found.after), found.movement.change, _drawn(view), moved)

    def ask(self, *question: Any) -> Shown:
        """Have ``work`` answer a question of another thread; see ``show``."""
        answer: Future[Shown] = Future()
        self._asked.put((answer, question))
        return answer.result()

    def work(self) -> NoReturn:
        """Answer what is asked, one after the other, until interrupted.

        Torch must run in one thread that is not the server's: a model is hooked while it is looked into, and threads
        of the server that have used torch may crash when Python ends.
        """
        while True:
            answer, question = self._asked.get()
            try:
                answer.set_result(self.show(*question))
            except Exception as error:
                answer.set_exception(error)

    def _view(self, given: dict[str, Any]) -> View | None:
        """Return what the model attends to; None if it does not tell."""
        try:
            return replace(self.model.attention(**given), id=given["text"], run="")
        except ConfigError:
            return None

    def page(self, gradio: Any) -> Any:
        """Build the page.

        Args:
            gradio: the package.
        """

        def answer(image: Any, text: str | None, radius: float, modality: str | None) -> Shown:
            try:
                return self.ask(image, text, radius, modality)
            except VillaError as error:
                raise gradio.Error(str(error), duration=None, print_exception=False) from error

        config = self.model.parts.config
        title = f"villa: {config.name}"
        with gradio.Blocks(title=title, analytics_enabled=False, delete_cache=(3600, 3600)) as page:
            about = _INTRODUCTION.format(name=config.name, model=config.model.name, trainer=config.trainer.name)
            gradio.Markdown(about)
            with gradio.Row():
                with gradio.Column(scale=2):
                    image = self._image(gradio)
                    text = gradio.Textbox(label="Question", lines=1, max_lines=4, submit_btn=False)
                    button = gradio.Button("Answer", variant="primary")
                    radius = gradio.Slider(
                        0,
                        _LARGEST,
                        0,
                        step=_STEP,
                        label="Size of the perturbation",
                        visible=bool(self.modalities),
                        info="Largest length, relative to the embedding; 0 for no attack",
                    )
                    modality = gradio.Radio(
                        [(_NAMES[name], name) for name in self.modalities],
                        label="What is attacked",
                        value=next(reversed(self.modalities), None),
                        visible=len(self.modalities) > 1,
                    )
                with gradio.Column(scale=3):
                    with gradio.Row():
                        answers = gradio.Label(label="Answers and their scores")
                        attacked = gradio.Label(label="Under attack", visible=bool(self.modalities))
                    change = gradio.Markdown()
                    moved = _output(gradio, "What the adversary moves")
                    gradio.Markdown("**Attention** from words to the image: mean of the heads of the last layer")
                    attention = _output(gradio, "Attention")
            triggers = [button.click, text.submit, radius.release, modality.input]
            shown = [answers, attacked, change, attention, moved]
            gradio.on(triggers, answer, [image, text, radius, modality], shown, api_name="answer")
        return page

    def _image(self, gradio: Any) -> Any:
        if self.regions == "features":
            return gradio.File(label="Region features of the image (.npz, .safetensors)", type="filepath")
        return gradio.Image(
            label="Image", type="pil", sources=["upload", "clipboard"], visible=self.regions != "none", height=320
        )


def demo(
    path: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    open_browser: bool = False,
    wait: bool = True,
    revision: str | None = None,
    device: str = "auto",
    user_dir: str | Path | Sequence[str | Path] | None = None,
) -> Any:
    """Serve a page on which a trained model answers questions; see docs/demo.md.

    Args:
        path: as for ``from_pretrained``.
        host: address to listen at; ``0.0.0.0`` lets other machines in.
        port: port to listen at; 0 takes a free one.
        open_browser: open the page in the browser.
        wait: serve until interrupted; otherwise return at once, and serve until the process ends.
        revision: as for ``from_pretrained``.
        device: as for ``from_pretrained``.
        user_dir: as for ``from_pretrained``.

    Returns:
        Gradio's page, whose ``close()`` ends it; ``local_url`` is its address.

    Raises:
        CheckpointError: the folder holds no intact checkpoint.
        ConfigError: gradio is not installed, the port is taken, or the model answers no free questions.
    """
    gradio = _gradio()
    if not 0 <= port < 1 << 16:
        raise ConfigError(f"port={port}: give 0 to {(1 << 16) - 1}")
    shown = Demo(from_pretrained(path, revision=revision, device=device, user_dir=user_dir))
    page = shown.page(gradio)
    fonts: dict[str, Any] = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    try:
        page.launch(
            server_name=host,
            server_port=port or _free_port(host),
            inbrowser=open_browser,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            show_error=True,
            ssr_mode=False,
            footer_links=[],
            enable_monitoring=False,
            theme=gradio.themes.Default(**fonts),
        )
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"the page cannot be served at {host}:{port} ({one_line(error)}); give another port or host"
        ) from error
    print(f"{page.local_url} (Ctrl-C ends it)" if wait else page.local_url, flush=True)
    if wait:
        try:
            shown.work()
        finally:
            page.close(verbose=False)
    threading.Thread(target=shown.work, daemon=True).start()
    return page


def _free_port(host: str) -> int:
    import socket

    with socket.create_server((host, 0)) as server:
        return int(server.getsockname()[1])


def _gradio() -> Any:
    """Import gradio, without its reports to its makers.

    Raises:
        ConfigError: it is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError as error:
        raise ConfigError(f"the page needs gradio ({one_line(error)}); pip install 'villa[gradio]'") from error
    return gradio


def _output(gradio: Any, label: str) -> Any:
    """Return a component for a picture, without the button that would send it to a site."""
    buttons = ["download", "fullscreen"]
    return gradio.Image(label=label, show_label=False, interactive=False, format="png", buttons=buttons)


def _drawn(view: View | None) -> Image.Image | None:
    return None if view is None else _picture(draw_words(view, f"{len(view.layers)}.mean"))


def _picture(figure: Figure) -> Image.Image:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return Image.open(buffer)
