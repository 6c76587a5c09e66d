"""Records what timm's vision transformers say, for test_vit.py.

pip install torch timm
python tests/record_vit.py
"""

import numpy as np
import recording

REFERENCES = recording.REFERENCES / "vit.npz"
CLASSES = 10
# Weights: patch, width, depth, heads, and pixels of the positions.
SIZES = {
    "deit_tiny": (16, 192, 12, 3, 224),
    "narrow": (8, 96, 2, 4, 40),  # 24 features a head
}
# Name: (weights, number of images, pixels).
CASES = {name: (name, 2, size[-1]) for name, size in SIZES.items()}


def random_state_dict(weights):
    """Weights in the ranges of a trained network's, from a seed.

    Tokens begin small, so that the epsilon of the first normalisation tells.
    """
    patch, width, depth, _, pixels = SIZES[weights]
    rng = np.random.default_rng(0)
    tokens = 1 + (pixels // patch) ** 2
    state = {
        "cls_token": rng.normal(0, 0.02, (1, 1, width)),
        "pos_embed": rng.normal(0, 0.02, (1, tokens, width)),
    }

    def norm(name):
        state[f"{name}.weight"] = rng.uniform(0.5, 1.5, width)
        state[f"{name}.bias"] = rng.normal(0, 0.3, width)

    def dense(name, outputs, inputs):
        recording.dense(state, rng, name, outputs, inputs)

    dense("patch_embed.proj", width, 3 * patch**2)
    kernel = 0.05 * state["patch_embed.proj.weight"]
    state["patch_embed.proj.weight"] = kernel.reshape(width, 3, patch, patch)
    state["patch_embed.proj.bias"] *= 0.05
    for index in range(depth):
        block = f"blocks.{index}"
        norm(f"{block}.norm1")
        dense(f"{block}.attn.qkv", 3 * width, width)
        dense(f"{block}.attn.proj", width, width)
        norm(f"{block}.norm2")
        dense(f"{block}.mlp.fc1", 4 * width, width)
        dense(f"{block}.mlp.fc2", width, 4 * width)
    norm("norm")
    dense("head", CLASSES, width)
    return recording.float32(state)


def main():
    import timm
    from timm.models import vision_transformer

    def make(weights, pixels):
        patch, width, depth, heads, _ = SIZES[weights]
        if weights == "deit_tiny":
            model = timm.create_model("deit_tiny_patch16_224", num_classes=CLASSES)
        else:
            model = vision_transformer.VisionTransformer(
                img_size=pixels,
                patch_size=patch,
                embed_dim=width,
                depth=depth,
                num_heads=heads,
                num_classes=CLASSES,
            )
        return model, random_state_dict(weights)

    recording.record(REFERENCES.name, CASES, make)


if __name__ == "__main__":
    main()
