"""Tokens as one step of a pipeline of Ray Data: `python ray_tokens.py BUNDLE IMAGES OUTPUT`.

Reads parquet files with a column `image` of bytes or {bytes, path}, as Hugging Face's `datasets`
writes them, adds a column `indices`, and writes the other columns and the tokens as parquet files.
For tokens alone, and a job that goes on after it was killed, there is `python -m vqdeploy encode
BUNDLE IMAGES --output OUTPUT --engine ray`. Needs `pip install 'portable-vqvae[ray]'`.
"""

import argparse
from pathlib import Path

import ray
import ray.data

from vqdeploy.cluster import CodecActor


def main(bundle, images, output, workers, address):
    ray.init(address)
    tokens = ray.data.read_parquet(str(images)).map_batches(
        CodecActor,
        fn_constructor_args=[str(bundle.absolute())],
        batch_size=256,
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=1,  # on cards: num_gpus=1, or a part of one
    )
    tokens.drop_columns(["image"]).write_parquet(str(output))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--address", default="local", help="of a cluster (default: start one)")
    given = parser.parse_args()
    paths = given.bundle, given.images.absolute(), given.output.absolute()
    main(*paths, given.workers, given.address)
