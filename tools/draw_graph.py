"""Draws the graph of a gin file without weights or data.

python tools/draw_graph.py --gin_file=gin/mnist_sba.gin --out=tree.svg
python tools/draw_graph.py --gin_file=gin/mnist_sba.gin --gin_param='Term.weighting=@KL()' --out=tree.mmd
"""

import argparse
import sys
from pathlib import Path


def draw(node, out, title):
    """The picture in the language that the suffix of ``out`` names."""
    from ratiograph.config import tree

    if out.suffix == ".svg":
        return tree.to_svg(node, title)
    if out.suffix in (".mmd", ".mermaid"):
        return tree.to_mermaid(node)
    raise ValueError(f"--out={out}: draw to a name that ends in .svg or .mmd")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gin_file", action="append", required=True, help="a gin file; repeatable")
    parser.add_argument("--gin_param", action="append", default=[], help="a line of gin; repeatable")
    parser.add_argument("--out", type=Path, default=Path("tree.svg"), help="tree.svg or tree.mmd")
    parser.add_argument("--title", default="", help="heading of the picture")
    args = parser.parse_args(arguments)
    import torch

    from ratiograph import config
    from ratiograph.config import tree

    try:
        cfg = config.parse(args.gin_file, args.gin_param)
        with torch.device("meta"):
            node = tree.describe(config.build(cfg))
        picture = draw(node, args.out, args.title or Path(args.gin_file[-1]).stem)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(picture, encoding="utf-8")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, config.ConfigError) else 1
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
