"""MeZO in PyTorch: a step that perturbs the weights in place.

Written from the published algorithm, for the vision transformer of
`experiments.models.vit`. It is measured beside the same network's
inference in PyTorch.

Reference:
  Malladi et al., "Fine-tuning language models with just forward passes", NeurIPS 2023,
  algorithm 1.
"""

import torch
from torch import nn

from experiments.benchmarks import programs
from experiments.models import vit


class DeiT(nn.Module):
    """The network of `experiments.models.vit.ViT` in PyTorch's own modules."""

    def __init__(self, network: vit.ViT, input_shape: tuple[int, ...]) -> None:
        """Takes the sizes of a Flax module.

        Args:
          network: the module.
          input_shape: height, width and channels of an image.
        """
        super().__init__()
        height, width, channels = input_shape
        num_patches = (height // network.patch) * (width // network.patch)
        self.patches = nn.Conv2d(
            channels, network.width, network.patch, stride=network.patch
        )
        self.class_token = _small(1, network.width)
        self.positions = _small(num_patches + 1, network.width)
        self.blocks = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(
                    network.width,
                    network.num_heads,
                    network.mlp_width,
                    dropout=0.0,
                    activation="gelu",
                    layer_norm_eps=1e-6,
                    batch_first=True,
                    norm_first=True,
                )
                for _ in range(network.depth)
            )
        )
        self.norm = nn.LayerNorm(network.width, eps=1e-6)
        self.head = nn.Linear(network.width, network.num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits [batch, classes] of images [batch, channels, height, width]."""
        x = self.patches(images).flatten(2).transpose(1, 2)
        token = self.class_token.expand(len(x), -1, -1)
        x = torch.cat([token, x], dim=1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


def _small(tokens: int, width: int) -> nn.Parameter:
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(1, tokens, width), std=0.02))


class Mezo:
    """A network, a batch, and the two things that are timed.

    Attributes:
      num_parameters: how many weights there are.
    """

    def __init__(
        self,
        network: vit.ViT,
        input_shape: tuple[int, ...],
        batch_size: int,
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Builds the network with random weights and data.

        Args:
          network: the Flax module to be like.
          input_shape: height, width and channels of an image.
          batch_size: images of a batch.
          device: of PyTorch, where all of it lies.
          dtype: of the weights and the images.
        """
        torch.manual_seed(0)
        height, width, channels = input_shape
        # Without dropout, eval() changes nothing but the speed: it admits PyTorch's
        # fused encoder layer.
        self._model = DeiT(network, input_shape).eval().to(device, dtype)
        images = torch.randn(batch_size, channels, height, width)
        self._images = images.to(device, dtype)
        self._labels = torch.randint(network.num_classes, (batch_size,)).to(device)
        self._seed = 0
        self.num_parameters = sum(p.numel() for p in self._model.parameters())

    @torch.no_grad()
    def inference(self) -> float:
        """The loss of the batch."""
        logits = self._model(self._images)
        return float(nn.functional.cross_entropy(logits, self._labels))

    @torch.no_grad()
    def step(self) -> None:
        """One step: the weights go to +ε, to -ε, back, and down the slope."""
        self._seed += 1
        self._perturb(programs.EPSILON)
        plus = self.inference()
        self._perturb(-2 * programs.EPSILON)
        minus = self.inference()
        self._perturb(programs.EPSILON)
        slope = (plus - minus) / (2 * programs.EPSILON)
        self._perturb(-programs.LEARNING_RATE * slope)

    def _perturb(self, scale: float) -> None:
        """Adds ``scale * z`` to the weights, with the z of this step's seed."""
        like = next(self._model.parameters())
        generator = torch.Generator(like.device).manual_seed(self._seed)
        for parameter in self._model.parameters():
            z = torch.randn(
                parameter.shape,
                generator=generator,
                device=like.device,
                dtype=like.dtype,
            )
            parameter.add_(z, alpha=scale)
