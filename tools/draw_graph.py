"""Draws the graph of a gin file without weights or data.

python tools/draw_graph.py --gin_file=gin/mnist_sba.gin --out=graph.svg
python tools/draw_graph.py --gin_file=gin/mnist_sba.gin --gin_param='Term.weighting=@KL()' --out=graph.mmd
"""

import argparse
import sys
from pathlib import Path

import torch

from ratiograph import config, graph


def draw(node: graph.Node, out: Path, title: str) -> str:
    """The picture in the language that the suffix of ``out`` names."""
    if out.suffix == ".svg":
        return graph.to_svg(node, title)
    if out.suffix in (".mmd", ".mermaid"):
        return graph.to_mermaid(node)
    raise ValueError(f"--out={out}: draw to a name that ends in .svg or .mmd")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gin_file", action="append", required=True, help="a gin file; repeatable")
    parser.add_argument("--gin_param", action="append", default=[], help="a line of gin; repeatable")
    parser.add_argument("--out", type=Path, default=Path("graph.svg"), help="graph.svg or graph.mmd")
    parser.add_argument("--title", default="", help="heading of the picture")
    args = parser.parse_args(arguments)
    try:
        cfg = config.parse(args.gin_file, args.gin_param)
        with torch.device("meta"):
            node = graph.describe(config.build(cfg))
        args.out.write_text(draw(node, args.out, args.title or Path(args.gin_file[-1]).stem), encoding="utf-8")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, config.ConfigError) else 1
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
