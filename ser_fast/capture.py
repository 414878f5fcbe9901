"""Tokens of any vision transformer, from inside its forward pass: timm's, Hugging Face's, or one's own."""

from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

# Where models keep their blocks: timm; Hugging Face's ViT and DINOv2 in their versions, with and without a head.
_BLOCKS = ("blocks", "encoder.layer", "layer", "layers", "encoder.layers", "model.layer")
_INNER = ("vit", "dinov2", "dinov2_with_registers", "deit", "model", "module")


class TokenCapture:
    """The patch tokens after a block, as a forward pass of the model leaves them.

    The block is hooked until `close`, or until the `with` ends. Gradients flow through what is captured.

    Args:
        model: whose forward pass is called with images (B, 3, Hp, Wp) as its first argument, or as pixel_values.
        block: how many blocks lie before the tokens, from 1; or the module whose output they are.
        prefix: tokens before the patches ([CLS], registers); default what the model says of itself.

    Raises:
        ValueError: blocks that can't be found; give the module.

    Example:
        >>> capture = TokenCapture(timm.create_model("vit_small_patch16_224"), block=3)
        >>> embedding = vit(images)
        >>> capture.tokens.shape  # of the last forward pass
        torch.Size([8, 14, 14, 384])
    """

    def __init__(self, model: nn.Module, block: int | nn.Module, *, prefix: int | None = None) -> None:
        self.model = model
        self.prefix = _prefix(model) if prefix is None else prefix
        self._images: Tensor | None = None
        self._tokens: Tensor | None = None
        module = block if isinstance(block, nn.Module) else _find_block(model, block)
        self._handles: list[RemovableHandle] = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            module.register_forward_hook(self._after),
        ]

    @property
    def tokens(self) -> Tensor:
        """(B, H, W, C) of the last forward pass.

        Raises:
            ValueError: there was none, or the tokens are not those of a lattice of patches.
        """
        if self._tokens is None or self._images is None:
            raise ValueError("tokens: the model was not called yet, or its forward pass went by the block")
        tokens = self._tokens[:, self.prefix :]
        height, width = self._images.shape[2:]
        count = tokens.shape[1]
        # Of all lattices with so many tokens, that of square patches.
        found = [rows for rows in range(1, count + 1) if count % rows == 0 and rows * width == count // rows * height]
        if not found:
            raise ValueError(
                f"prefix: got {self.prefix}, which leaves {count} tokens of images of {height} x {width} pixels: no "
                "lattice of square patches"
            )
        return tokens.unflatten(1, (found[0], count // found[0]))

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> "TokenCapture":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim == 4]
        self._images, self._tokens = given[0] if given else None, None

    def _after(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        self._tokens = output[0] if isinstance(output, tuple) else output


def _find_block(model: nn.Module, block: int) -> nn.Module:
    for inner in ("", *_INNER):
        for name in _BLOCKS:
            try:
                blocks = model.get_submodule(f"{inner}.{name}" if inner else name)
            except AttributeError:
                continue
            if isinstance(blocks, nn.ModuleList | nn.Sequential):
                if block not in range(1, len(blocks) + 1):
                    raise ValueError(f"block: got {block}, takes 1 to {len(blocks)}, or the module")
                return blocks[block - 1]
    raise ValueError(f"block: the blocks of {type(model).__name__} can't be found; give the module itself")


def _prefix(model: nn.Module) -> int:
    for inner in ("", *_INNER):
        try:
            part: Any = model.get_submodule(inner)
        except AttributeError:
            continue
        if hasattr(part, "num_prefix_tokens"):  # timm
            return int(part.num_prefix_tokens)
        if hasattr(part, "config"):  # Hugging Face
            return 1 + int(getattr(part.config, "num_register_tokens", 0) or 0)
    raise ValueError(f"prefix: {type(model).__name__} does not say how many tokens come before the patches; give it")
