"""Pictures with texts that are prepared once: which there are, and the way from a recipe's section to the data."""

from collections.abc import Callable

from fastdiff.data.caption_files import coco_source, flickr30k_source
from fastdiff.data.clipart import clipart_source
from fastdiff.data.config import DataConfig
from fastdiff.data.prepared import PreparedData, Source, prepared
from fastdiff.data.stamps import stamps_source

SOURCES: dict[str, Callable[[DataConfig], Source]] = {
    "clipart": clipart_source,
    "stamps": stamps_source,
    "coco": coco_source,
    "flickr30k": flickr30k_source,
}


def load_prepared(config: DataConfig) -> PreparedData:
    """The data from the cache; where it is not there yet, it is prepared, as by `fastdiff prepare`.

    Raises as `prepared` and the source do.
    """
    return prepare(config)


def prepare(config: DataConfig, *, skip_broken: bool = False, progress: bool = True) -> PreparedData:
    """Draws or decodes what is not there yet; see `prepared`.

    Raises ValueError where `config` names data that needs no preparation.
    """
    if config.name not in SOURCES:
        raise ValueError(f"name: got {config.name!r}, which needs no preparation; expected one of {', '.join(SOURCES)}")
    return prepared(SOURCES[config.name](config), config.image_size, skip_broken=skip_broken, progress=progress)
