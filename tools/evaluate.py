"""Numbers of a finished run's student, of two folders of images, or the statistics of real ones, as the field has them.

  python tools/evaluate.py runs/mnist_sba --samples=5000                      the run's student against its own data
  python tools/evaluate.py runs/mnist_sba --features=digits --metrics=frechet,kid_exact --raw
  python tools/evaluate.py folder samples/ real/ --features=lite0             two folders of images, or .npz of them

CIFAR-10 and ImageNet-64, 50,000 samples of seed 0 against all training images, on the features that EDM and the papers
after it publish FID by; --features=inception is clean-fid's:

  python tools/evaluate.py stats --data='data/cifar10/cifar10-{000000..000009}.tar' --features=inception_tf
         --out=c10.npz
  python tools/evaluate.py runs/cifar --preset=cifar10 --reference=c10.npz

Zero-shot COCO-30k of a Stable Diffusion student: a fixed list of 30,000 captions of val2014, a sample each, resized to
256 x 256 as clean-fid does, against the images of val2014 at that size. The list is drawn from COCO's file (captions by
id, shuffled by seed 0), or is the first 30,000 lines of a text file with a caption a line:

  python tools/evaluate.py stats --data=coco/val2014 --size=256 --features=inception --out=coco256.npz
  python tools/evaluate.py runs/sd --preset=coco30k --reference=coco256.npz --pipeline=teachers/sd15
         --captions=coco/annotations/captions_val2014.json --clip=weights/clip-vit-large-patch14

In-batch similarity takes several samples a caption: --prompts=200 --repeats=8 --samples=1600
--metrics=in_batch_similarity --features=timm:vit_small_patch16_224.dino. What lacks its weights is named with the
command that fetches it, and left out. A run's numbers are added to its evaluation.json; --out writes them elsewhere.
On several GPUs: torchrun --nproc-per-node=8 tools/evaluate.py ..., with the same numbers.
"""

import logging

from absl import flags
from absl import logging as absl_logging

from ratiograph import command_line

FEATURES = ("lite0", "inception", "inception_legacy", "inception_tf", "digits", "timm:NAME")
METRICS = ("frechet", "kid", "kid_exact", "inception_score", "neighbours", "in_batch_similarity")
PRESETS = {
    "cifar10": {"samples": 50_000, "features": ["inception_tf"]},
    "imagenet64": {"samples": 50_000, "features": ["inception_tf"]},
    "coco30k": {"samples": 30_000, "features": ["inception"], "prompts": 30_000},
}

FLAGS = flags.FLAGS
flags.DEFINE_list("metrics", ["frechet", "kid", "inception_score", "neighbours"], f"Some of {', '.join(METRICS)}.")
flags.DEFINE_list(
    "features", ["lite0"], f"One or several of {', '.join(FEATURES)}; the first one's numbers come first."
)
flags.DEFINE_multi_string("weights", [], "FEATURES=FILE: where the weights of one of --features are; repeatable.")
flags.DEFINE_enum("preset", None, sorted(PRESETS), "Samples and features of a published protocol; flags override it.")
flags.DEFINE_integer("samples", 5000, "Samples of the student.", lower_bound=4, upper_bound=10**8)
flags.DEFINE_integer("real_samples", 0, "Real images; 0 takes all.", lower_bound=0)
flags.DEFINE_string("reference", None, "Real images: shards, folder, .npz of images or of statistics; the run's data.")
flags.DEFINE_string("data", None, "stats: the images, as --reference.")
flags.DEFINE_integer(
    "size", 0, "Crops and resizes image files of a folder to so many pixels a side.", lower_bound=0, upper_bound=8192
)
flags.DEFINE_string("out", None, "stats: the .npz; otherwise the JSON, WORKDIR/evaluation.json for a run.")
flags.DEFINE_bool("raw", False, "Also the weights of the newest checkpoint; done anyway where there are several EMAs.")
flags.DEFINE_string("clip", None, "Folder of a CLIP model: also CLIP scores.")
flags.DEFINE_string("hps", None, "HPS_v2.1_compressed.pt: also HPSv2 scores.")
flags.DEFINE_string("aesthetic", None, "Head of LAION's aesthetic predictor, on --clip: also its scores.")
flags.DEFINE_string("captions", None, "COCO's captions file, or one caption a line: what the student is asked for.")
flags.DEFINE_string("pipeline", None, "Folder of a Stable Diffusion pipeline: text encoder and autoencoder.")
flags.DEFINE_bool("sdxl", False, "The pipeline is SDXL's.")
flags.DEFINE_integer("prompts", 1000, "Captions of the list.", lower_bound=1, upper_bound=10**8)
flags.DEFINE_integer("repeats", 1, "Samples of each caption.", lower_bound=1, upper_bound=10**6)
flags.DEFINE_integer("seed", 0, "Seed of the samples.", lower_bound=0, upper_bound=2**63 - 1)
flags.DEFINE_integer("batch_size", 64, "Images at a time.", lower_bound=1)
command_line.define_bindings()
command_line.define_device()


def apply_preset():
    """Sets the flags that --preset decides and the command line does not."""
    for name, value in PRESETS.get(FLAGS.preset, {}).items():
        if not FLAGS[name].present:
            setattr(FLAGS, name, value)


def main(arguments):
    absl_logging.set_verbosity(absl_logging.WARNING)
    logging.getLogger("ratiograph").setLevel(logging.ERROR)  # what was left out is printed with the results
    apply_preset()
    mode, *folders = arguments or [""]
    if not mode or len(folders) != (2 if mode == "folder" else 0):
        raise ValueError("give the folder of a run, 'stats', or 'folder A B'; --help explains")
    from finished_runs import judging

    judging.judge(mode, *folders)


if __name__ == "__main__":
    command_line.run(main)
