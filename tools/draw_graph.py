"""Draws the graph of a gin file without weights or data.

  python tools/draw_graph.py --gin_file=gin/mnist_sba.gin --out=tree.svg
  python tools/draw_graph.py --gin_file=gin/mnist_sba.gin --gin_param='Term.weighting=@KL()' --out=tree.mmd

Exit codes: 0 done, 1 the picture cannot be written, 2 the configuration or the command line is wrong.
"""

from pathlib import Path

from absl import flags

from ratiograph import command_line

FLAGS = flags.FLAGS
command_line.define_configuration()
flags.DEFINE_string("out", "tree.svg", "The picture: a name that ends in .svg, .mmd or .mermaid.")
flags.DEFINE_string("title", "", "Heading of the picture; the name of the last gin file by default.")


def main(arguments):
    command_line.needs_configuration(arguments)
    import torch

    from ratiograph import config
    from ratiograph.config import tree
    from ratiograph.core.files import write_atomically
    from ratiograph.reports.graph_picture import to_svg
    from ratiograph.reports.mermaid import to_mermaid

    with torch.device("meta"):
        node = tree.describe(config.build(config.parse(FLAGS.gin_file, FLAGS.gin_param)))
    out = Path(FLAGS.out)
    if out.suffix == ".svg":
        picture = to_svg(node, FLAGS.title or Path(FLAGS.gin_file[-1]).stem)
    elif out.suffix in (".mmd", ".mermaid"):
        picture = to_mermaid(node)
    else:
        raise ValueError(f"--out={out}: draw to a name that ends in .svg or .mmd")
    write_atomically(out, picture.encode(errors="replace"))
    print(out)


if __name__ == "__main__":
    command_line.run(main, code_of=command_line.configuration_code)
