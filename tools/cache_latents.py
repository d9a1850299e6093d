"""Turns images and captions into latents and text states once, so that training runs neither encoder.

  python tools/cache_latents.py 'laion/{00000..00127}.tar' data/sd15 --teacher=teachers/stable-diffusion-v1-5 \\
      --empty_prompt=teachers/stable-diffusion-v1-5/empty_prompt.safetensors
  python tools/cache_latents.py 'coco/val-{000000..000004}.tar' data/coco-sdxl --teacher=SDXL --resolution=1024
  python tools/cache_latents.py prompts.txt data/prompts --teacher=SD15 --caption_only     a prompt a line, no images

  python tools/cache_latents.py laion/ data/sd15 --teacher=v1-5-pruned.safetensors --text_encoder=SD15     one file

IN are shards of images and captions as img2dataset writes them (jpg, txt, json) or tools/make_shards.py: with braces, a
pattern ('laion/*.tar') or a folder of them. OUT gets a shard for each: latents in float16 times the scaling factor,
text states, the caption, for SDXL the pooled caption and sizes; 0.15 MB a sample for SD 1.5. The teacher says which of
the two it is. OUT/index.json keeps digests of the encoders' weights, the scaling factor and shapes, which training
compares with its own model's, and names damaged samples. Interrupted in any way, the same command continues at the
first shard that is lacking. Images are resized to the resolution and cropped to the centre.
With --caption_only there are no latents: a generator whose objective asks for no real samples is fed such shards by
Experiment.data = @CachedCaptionStream().
"""

import shlex
from pathlib import Path

from absl import flags

from ratiograph import command_line

FLAGS = flags.FLAGS
flags.DEFINE_string(
    "teacher",
    None,
    "The pipeline in diffusers' format: folder, or hf://OWNER/NAME; or a .safetensors file of the whole model.",
    required=True,
)
flags.DEFINE_string("text_encoder", None, "A pipeline whose text encoders and tokenizers are taken; default: teacher.")
flags.DEFINE_integer("resolution", None, "Pixels of the images; default: 512 for SD 1.5, 1024 for SDXL.", lower_bound=8)
flags.DEFINE_string("empty_prompt", None, "Also write the states of the empty prompt to this file, for guidance.")
flags.DEFINE_bool("caption_only", False, "IN is a text file with a prompt a line; no latents are made.")
flags.DEFINE_integer("shard_samples", 10_000, "With --caption_only: prompts of one shard.", lower_bound=1)
flags.DEFINE_integer("sample_seed", None, "Take a sample of the autoencoder's posterior, by this seed, not its mean.")
flags.DEFINE_integer("batch_size", 16, "Images encoded at a time.", lower_bound=1)
flags.DEFINE_integer("workers", 4, "Threads that decode images.", lower_bound=1)
command_line.define_device()
flags.DEFINE_float("max_damaged", 0.0, "Fraction of the samples that may be damaged.", lower_bound=0, upper_bound=1)
flags.DEFINE_float("minimum_aesthetic", None, "Least score of LAION's aesthetic predictor, in the samples' .json.")
flags.DEFINE_integer("minimum_side", None, "Least pixels of the original's shorter side, in the samples' .json.")
flags.DEFINE_float("maximum_watermark", None, "Greatest probability of a watermark, in the samples' .json.")

FILTERS = ("minimum_aesthetic", "minimum_side", "maximum_watermark")


def samples_and_settings(source, encoder, resolution, device):
    """What the cache will hold, and the settings that an interrupted command must repeat."""
    from preparation.input_shards import input_shards
    from preparation.latent_cache import CachedImages, CachedPrompts
    from ratiograph.core.foreign import lines_of, read_text
    from ratiograph.data.captioned import CaptionedStream
    from ratiograph.networks.autoencoder import Autoencoder

    settings = {"source": source, "teacher": FLAGS.teacher}
    if FLAGS.text_encoder:
        settings["text_encoder"] = FLAGS.text_encoder
    if FLAGS.caption_only:
        if not Path(source).is_file():
            raise ValueError(f"no file of prompts at {source}: with --caption_only, IN has a prompt a line")
        prompts = lines_of(read_text(source))
        if not prompts:
            raise ValueError(f"{source} is empty: give a prompt a line")
        return CachedPrompts(prompts, encoder, FLAGS.shard_samples), settings | {"shard_samples": FLAGS.shard_samples}
    filters = {name: FLAGS[name].value for name in FILTERS}
    stream = CaptionedStream(urls=source, resolution=resolution, sizes=True, max_damaged=FLAGS.max_damaged, **filters)
    autoencoder = Autoencoder(weights=FLAGS.teacher, chunk=FLAGS.batch_size)
    autoencoder.load()
    images = CachedImages(
        stream,
        input_shards(source),
        autoencoder.to(device),
        encoder,
        FLAGS.sample_seed,
        FLAGS.batch_size,
        FLAGS.workers,
    )
    return images, settings | filters | {"resolution": resolution, "sample_seed": FLAGS.sample_seed}


def summary(folder, index, samples):
    """What the cache holds, and the flags to train with."""
    shards = index["shards"]
    count = sum(entry["samples"] for entry in shards.values())
    urls = f"{folder}/shard-{{000000..{len(shards) - 1:06d}}}.tar"
    stream = " --gin_param='Experiment.data = @CachedCaptionStream()' --gin_param='CachedCaptionStream.urls = %DATA'"
    damaged = sum(len(entry.get("damaged", ())) for entry in shards.values())
    named = f", named in {folder}/index.json" if damaged else ""
    return (
        f"{count:,} samples in {len(shards):,} shards, {samples.skipped:,} filtered out, {damaged:,} damaged{named}\n"
        f"train with --data={shlex.quote(urls)}{stream if FLAGS.caption_only else ''}"
    )


def main(arguments):
    command_line.exactly(arguments, 2, "give two names: tools/cache_latents.py IN OUT")
    from preparation.latent_cache import cache_shards, encoder_of, write_empty_prompt
    from ratiograph.training.devices import choose_device

    source, folder = arguments[0], Path(arguments[1])
    device = choose_device(FLAGS.device)
    argument = "text_encoder" if FLAGS.text_encoder else "teacher"
    encoder, usual_resolution = encoder_of(FLAGS[argument].value, f"--{argument}")
    encoder.load()
    encoder.to(device)
    if FLAGS.empty_prompt:
        write_empty_prompt(Path(FLAGS.empty_prompt), encoder)
    samples, settings = samples_and_settings(source, encoder, FLAGS.resolution or usual_resolution, device)
    with command_line.progress_bar() as progress:
        bar = progress.add_task("shards", total=None)
        index = cache_shards(
            samples, folder, settings, lambda done, total: progress.update(bar, completed=done, total=total)
        )
    print(summary(folder, index, samples))


if __name__ == "__main__":
    command_line.run(main)
