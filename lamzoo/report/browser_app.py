"""The app in a browser: predictions and the explorer page of images and videos, and search in a folder of videos."""

from __future__ import annotations

import itertools
import logging
import tempfile
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lamzoo.data.paths import check_folder
from lamzoo.data.video.instants import Instants
from lamzoo.data.video.reader import read_video
from lamzoo.errors import ConfigError, DataError, LamzooError, MissingExtraError
from lamzoo.evaluation import predict, resolve_device
from lamzoo.reading import read_text
from lamzoo.reduction.budget import merge_to_share
from lamzoo.registry.catalog import list_models, model_info, task_of
from lamzoo.registry.factory import create_model
from lamzoo.report.explorer import explore_image
from lamzoo.tasks import find_task
from lamzoo.weights.sources import location

if TYPE_CHECKING:
    from gradio import Blocks

    from lamzoo.evaluation.classification.prediction import Prediction
    from lamzoo.video.search import VideoIndex

_log = logging.getLogger(__name__)

HOST, PORT = "127.0.0.1", 7860
FEWEST = 0.3  # share of its GMACs to which the budget of a model goes down
_CLASSES, _MATCHES = 5, 8
_KEPT = 4  # models in memory
_PAGES = 4  # kept beside gradio's own copies
_HOUR = 3600  # seconds, after which uploads and copies of pages are removed
_LARGEST = "200mb"  # of an upload
_FONTS = ["system-ui", "sans-serif"]  # of the system; gradio's own come from another server
_IMAGES, _VIDEOS = "classification", "retrieval"


def launch(
    models: Sequence[str] = (),
    *,
    videos: str | Path | None = None,
    host: str = HOST,
    port: int = PORT,
    device: str | torch.device = "auto",
    block: bool = True,
) -> Blocks:
    """Serves the app until it is interrupted.

    A visitor uploads an image or a video, chooses a model and a token budget, and sees predictions with the page of
    :func:`lamzoo.report.explore_image` or :func:`lamzoo.report.explore_video`. Visitors choose among the given models
    only, and search in the given folder only. Uploads are stored in gradio's folder of temporary files,
    from which they and the pages are removed after an hour or two.

    Args:
        models: names of models with masks for image classification or text-video retrieval; by default those whose
            weights are on this machine.
        videos: a folder of videos to search; needs a retrieval model.
        host: address to bind: only this machine by default.
        port: port to bind.
        device: a torch device, or ``"auto"``.
        block: False returns at once, with the server in a thread.

    Returns:
        The running app, with ``.local_url`` and ``.close()``.

    Raises:
        MissingExtraError: gradio is not installed.
        ConfigError: there is no model, a model is of another task, or the address can't be bound or reached.
        DataError: the folder does not exist.
        UnknownModelError: a name is unknown.
    """
    try:
        import gradio
        import httpx
    except ImportError as error:
        raise MissingExtraError(f"The app needs gradio ({error}); install it with: pip install 'lamzoo[app]'") from None
    app = build(models, videos=videos, device=device)
    try:
        app.launch(
            server_name=host,
            server_port=port,
            prevent_thread_lock=not block,
            share=False,
            quiet=True,
            ssr_mode=False,
            enable_monitoring=False,
            mcp_server=False,
            max_file_size=_LARGEST,
            app_kwargs={"middleware": _own_names_only(host)},
            theme=gradio.themes.Default(font=_FONTS, font_mono=["monospace"]),
        )
    except OSError as error:  # gradio says of an unknown host, too, that no port is free
        app.close()
        raise ConfigError(
            f"the app can't be served at {host}:{port} ({error}); choose another --port, and as --host an address of "
            "this machine"
        ) from error
    except Exception as error:
        app.close()
        if type(error) not in (Exception, ValueError) and not isinstance(error, httpx.HTTPError):
            raise
        # gradio asks its own address, through a proxy if there is one.
        raise ConfigError(
            f"the app does not answer at {host}:{port} ({type(error).__name__}); behind an HTTP proxy set "
            f"NO_PROXY=127.0.0.1,localhost, and choose as --host an address that this machine reaches"
        ) from error
    return app


def _own_names_only(host: str) -> list[Any]:
    """Returns the middleware that refuses requests under another name, by which a web site could read the app.

    A site that a visitor opens can resolve its own name to the loopback address (DNS rebinding). An app that serves the
    network can't know its names.
    """
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    own = ["127.0.0.1", "localhost"]
    return [Middleware(TrustedHostMiddleware, allowed_hosts=own)] if host in own else []


def build(
    models: Sequence[str] = (), *, videos: str | Path | None = None, device: str | torch.device = "auto"
) -> Blocks:
    """Builds the app without serving it; arguments and errors as of :func:`launch`."""
    import gradio

    target = resolve_device(device)
    by_task = _by_task(models)
    if videos is not None:
        check_folder(Path(videos))
        if not by_task[_VIDEOS]:
            raise ConfigError(f"the folder {videos} needs a retrieval model; name one of the family lam_clip4clip")
    shelf = _Shelf(target)
    with gradio.Blocks(title="lamzoo", analytics_enabled=False, delete_cache=(_HOUR, _HOUR)) as app:
        gradio.Markdown("# lamzoo\nWhat learnable attention masks do to an image or a video.")
        if by_task[_IMAGES]:
            _image_tab(gradio, shelf, by_task[_IMAGES])
        if by_task[_VIDEOS]:
            _video_tab(gradio, shelf, by_task[_VIDEOS])
        if videos is not None:
            _search_tab(gradio, shelf, by_task[_VIDEOS], Path(videos))
    return app


class _Shelf:
    """Loads models, keeps the last few, and computes what the tabs show."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.load = lru_cache(_KEPT)(self._load)
        self.index = lru_cache(1)(self._index)
        self._pages = tempfile.TemporaryDirectory(prefix="lamzoo-app-")  # removed with the process
        self._count = itertools.count(1)

    def _load(self, name: str, share: float) -> nn.Module:
        model = create_model(name, pretrained=True)
        if share < 1:
            merge_to_share(model, share)
        return model.to(self.device).eval()

    def _index(self, name: str, folder: Path) -> VideoIndex:
        from lamzoo.video.search import index_videos  # needs open_clip, as its models do

        return index_videos(folder, self.load(name, 1.0), device=self.device)

    def image(self, path: str | None, name: str, share: float) -> tuple[dict[str, float], str, str]:
        """Returns the probabilities of classes, the page in a frame, and the page's file."""
        if path is None:
            raise ConfigError("there is no image; upload one")
        model = self.load(name, share)
        (guesses,) = predict(model, [path], topk=_CLASSES, device=self.device)
        return _named(guesses), *self._page(partial(explore_image, model, path))

    def video(self, path: str | None, texts: str, name: str, share: float) -> tuple[str, str]:
        """Returns the page in a frame, and the page's file."""
        from lamzoo.report.explorer.retrieval_page import explore_video

        lines = [line.strip() for line in texts.splitlines() if line.strip()]
        if path is None or not lines:
            raise ConfigError("a video and at least one text are needed; upload a video, and write a text in each line")
        return self._page(partial(explore_video, self.load(name, share), path, lines))

    def _page(self, write: Callable[[Path], None]) -> tuple[str, str]:
        """Returns an explorer page in a frame of its own, and its file for download."""
        number = next(self._count)
        path = Path(self._pages.name) / f"masks-{number}.html"
        write(path)
        path.with_name(f"masks-{number - _PAGES}.html").unlink(missing_ok=True)
        page = escape(read_text(path))
        frame = f'<iframe title="masks and attention" sandbox="allow-scripts" srcdoc="{page}"'
        return f'{frame} style="width:100%;height:85vh;border:0"></iframe>', str(path)

    def search(self, folder: Path, query: str, name: str) -> list[tuple[Any, str]]:
        """Returns the middle frame and a caption of the videos that match best, without those that can't be read."""
        found, lost = self._search(folder, query, name)
        if lost:  # removed or changed since they were indexed
            self.index.cache_clear()
            found, _ = self._search(folder, query, name)
        return found

    def _search(self, folder: Path, query: str, name: str) -> tuple[list[tuple[Any, str]], int]:
        """Returns what :meth:`search` does from the present index, and the number of videos that can't be read."""
        shown = []
        found = self.index(name, folder).search(query, _MATCHES)
        for rank, match in enumerate(found, start=1):
            try:
                frame = read_video(match.path, Instants(at=(match.duration / 2,))).frames[0]
            except DataError as error:
                _log.warning("%s", error)
                continue
            shown.append((frame, f"{rank}. {match.path.name}, {match.duration:.1f} s, score {match.score:.3f}"))
        return shown, len(found) - len(shown)


def _named(guesses: Sequence[Prediction]) -> dict[str, float]:
    """Returns probabilities by the first name of each class; by all of its names where the first repeats ("crane")."""
    short = [guess.label.partition(",")[0] for guess in guesses]
    full = [guess.label for guess in guesses]
    return {
        first if short.count(first) == 1 else each if full.count(each) == 1 else f"{each} ({guess.index})":
        guess.probability
        for first, each, guess in zip(short, full, guesses, strict=True)
    }  # fmt: skip


def _by_task(names: Sequence[str]) -> dict[str, list[str]]:
    """Returns the models of each task of the app."""
    chosen = list(names) or [
        name
        for name in list_models("lam_*", pretrained=True)
        if (info := model_info(name)).tag is not None
        and location(info.tag, weights_dir=info.weights_dir) in ("bundled", "cached")
    ]
    found: dict[str, list[str]] = {_IMAGES: [], _VIDEOS: []}
    for name in chosen:
        task = task_of(name).name
        if task in found:
            if model_info(name).lam is None:
                raise ConfigError(f"{name} has no masks; the app shows those of models whose names begin with lam_")
            found[task].append(name)
        elif names:
            about = " or ".join(find_task(task).about for task in found)
            raise ConfigError(f"{name} is {task_of(name).model_kind}; the app takes models for {about}")
    if not any(found.values()):
        raise ConfigError("no model with masks has its weights on this machine; name one")
    return found


def _answering(gradio: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """Shows the library's errors to the visitor, as text; others are not shown, and are in the log."""

    def call(*inputs: Any) -> Any:
        try:
            return function(*inputs)
        except LamzooError as error:
            says = str(error)
            for path in (each for each in inputs if isinstance(each, str) and Path(each).is_absolute()):
                says = says.replace(path, Path(path).name)  # an upload, in a folder of the server
            raise gradio.Error(escape(says), print_exception=False) from error

    return call


def _path_of(upload: Any) -> str | None:
    """Returns the path of an uploaded file; None if there is none."""
    return None if upload is None else str(upload.path)


def _model_and_budget(gradio: Any, names: Sequence[str]) -> tuple[Any, Any]:
    name = gradio.Dropdown(list(names), value=names[0], label="model", elem_id="model")
    share = gradio.Slider(
        FEWEST, 1.0, value=1.0, step=0.05, label="token budget", info="share of the GMACs that merged tokens leave"
    )
    return name, share


def _image_tab(gradio: Any, shelf: _Shelf, names: Sequence[str]) -> None:
    with gradio.Tab("Image"):
        with gradio.Row():
            with gradio.Column():
                image = gradio.Image(type="filepath", label="image", height=300)
                # gradio's own opens it with all formats of Pillow, PostScript too, and doesn't show what is wrong.
                image.preprocess = _path_of
                name, share = _model_and_budget(gradio, names)
                button = gradio.Button("Explain", variant="primary", elem_id="explain-image")
            classes = gradio.Label(label="prediction", num_top_classes=_CLASSES)
        page = gradio.HTML()
        file = gradio.File(label="the page as a file")
        button.click(
            _answering(gradio, shelf.image), [image, name, share], [classes, page, file], concurrency_id="models",
            concurrency_limit=1,
        )  # fmt: skip


def _video_tab(gradio: Any, shelf: _Shelf, names: Sequence[str]) -> None:
    with gradio.Tab("Video"):
        video = gradio.Video(label="video", height=300)
        texts = gradio.Textbox(label="texts, one in each line", lines=3, placeholder="a man sings\na dog runs")
        name, share = _model_and_budget(gradio, names)
        button = gradio.Button("Explain", variant="primary", elem_id="explain-video")
        page = gradio.HTML()
        file = gradio.File(label="the page as a file")
        button.click(
            _answering(gradio, shelf.video), [video, texts, name, share], [page, file], concurrency_id="models",
            concurrency_limit=1,
        )  # fmt: skip


def _search_tab(gradio: Any, shelf: _Shelf, names: Sequence[str], folder: Path) -> None:
    with gradio.Tab("Search"):
        query = gradio.Textbox(label=f"search the videos in {folder.name}", elem_id="query")
        name = gradio.Dropdown(list(names), value=names[0], label="model")
        button = gradio.Button("Search", variant="primary", elem_id="search")
        found = gradio.Gallery(label="the best first", columns=4, elem_id="found")
        for event in (button.click, query.submit):
            event(
                _answering(gradio, partial(shelf.search, folder)), [query, name], found, concurrency_id="models",
                concurrency_limit=1,
            )  # fmt: skip
