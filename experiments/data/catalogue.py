"""Datasets of TFDS's own catalogue, which are prepared once and read everywhere.

Their builders need TensorFlow to prepare the files. Reading does not: the features are
described beside the files.
"""

import importlib.util

import tensorflow_datasets as tfds


def builder(name: str, data_dir: str) -> tfds.core.DatasetBuilder:
    """The builder of a dataset whose files are ready; prepares them if it can.

    Args:
      name: of the dataset, with its configuration and version, such as
        "cifar10:3.0.2".
      data_dir: where TFDS keeps it, as array_record files.

    Returns:
      The builder.

    Raises:
      ModuleNotFoundError: if the files are not there, and neither is TensorFlow.

    Example:
      >>> builder("cifar10:3.0.2", "/nowhere")  # doctest: +SKIP
      Traceback (most recent call last):
      ...
      ModuleNotFoundError: cifar10:3.0.2 is not prepared in /nowhere, ...
    """
    try:
        # With a version TFDS looks for the files first, and for its code if there
        # are none; the code of some datasets asks for TensorFlow at once.
        found = tfds.builder(name, data_dir=data_dir, file_format="array_record")
        ready = found.is_prepared()
    except ImportError:
        ready = False
    if ready:
        return found
    if importlib.util.find_spec("tensorflow") is None:
        raise ModuleNotFoundError(
            f"{name} is not prepared in {data_dir}, and TFDS prepares it by "
            "TensorFlow, which is not installed. Do it once, in any environment: "
            "pip install tensorflow tensorflow-datasets array-record, and in Python "
            f"import tensorflow_datasets as tfds; tfds.builder({name!r}, "
            f'data_dir={data_dir!r}, file_format="array_record").download_and_prepare()'
        )
    found.download_and_prepare()
    return found
