"""Sample a DiT: PIL images of the classes that you name, pasted into one picture."""

import sys
from pathlib import Path

import train_dit
from PIL import Image

import fastdiff


def main(run="runs/example_digits", output="digits.png", classes=("0", "3", "7"), num_images=8, **training):
    if not Path(run).exists():  # a hub id or any folder that fastdiff.load reads would do as well
        train_dit.main(run, **training)
    loaded = fastdiff.load(run)
    # Image i has the seed `seed` + i: the same call draws the same images, alone and in any batch.
    images = loaded.sample(classes, num_images_per_class=num_images, guidance_scale=1.5, num_inference_steps=25, seed=0)
    side = 40
    grid = Image.new("RGB", (num_images * side, len(classes) * side))
    for index, image in enumerate(images):  # the images of the first class, then those of the second, …
        row, column = divmod(index, num_images)
        grid.paste(image.resize((side, side)), (column * side, row * side))
    grid.save(output)
    print(f"{len(images)} images of {', '.join(classes)}, a row each: {output}")
    return images


if __name__ == "__main__":
    main(*sys.argv[1:3])
