"""The base of all networks: stages, whose outputs are features, and a head; under the names that timm's models have."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from timm.layers import SelectAdaptivePool2d
from timm.models import FeatureInfo
from torch import Tensor, fx, nn
from typing_extensions import override

from repopt.errors import UserError, shown
from repopt.layers import RepLayer, checkpoint_forward

POOLS = ("", "avg", "max", "avgmax")


def check_strides(strides: Sequence[int]) -> None:
    """Raise UserError unless these are strides of the five layers that halve the resolution."""
    if len(strides) != 5 or any(type(stride) is not int or stride not in (1, 2) for stride in strides):
        raise UserError(f"the strides of the five downsampling layers are 1 or 2 each, not {shown(strides)}")


class Network(nn.Module):
    """A classifier, (N, in_chans, H, W) -> (N, num_classes), or after `to_features` a list of feature maps.

    A subclass adds its stages, then what its head has besides pooling, dropout and the classifier, then calls
    `_add_head`. Stages stand in the order of the forward pass, by which others build feature extractors.

    Args:
        num_classes: outputs of the classifier; 0 = none, and the network gives what the classifier would take.
        in_chans: channels of an image.
        global_pool: see `reset_classifier`.
        drop_rate: dropout before the classifier.
        use_checkpoint: recompute every block's activations in the backward pass instead of keeping them.

    Attributes:
        first_conv, classifier_name: state-dict names of the first convolution and of the classifier.
        hidden_names: names of the head's modules between the pooling and the classifier.
        stage_names: names of the stages, in the order of the forward pass.
        feature_info: of every feature its channels ("num_chs"), how much smaller it is than the image ("reduction"),
            and the stage whose output it is ("module").
        num_features: channels of the last stage.
        head_hidden_size: channels that the classifier takes.
        out_indices: indices of the features that the network gives instead of classifying.
    """

    first_conv: ClassVar[str]
    classifier_name: ClassVar[str]
    hidden_names: ClassVar[tuple[str, ...]] = ()

    stage_names: Sequence[str]
    feature_info: list[dict[str, Any]] | FeatureInfo
    num_features: int
    head_hidden_size: int
    global_pool: SelectAdaptivePool2d

    def __init__(
        self,
        *,
        num_classes: int,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        self.use_checkpoint = use_checkpoint
        self.out_indices: list[int] | None = None
        self._first_pool = global_pool

    def stem(self, x: Tensor) -> Tensor:
        """Run what stands before the stages, (N, in_chans, H, W) -> (N, C, h, w)."""
        return x

    def hidden(self, x: Tensor) -> Tensor:
        """Run what stands between the pooling and the classifier, (N, C, h, w) -> (N, C', h, w)."""
        return x

    @override
    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        if self.out_indices is None:
            return self.forward_head(self.forward_features(x))
        return self._through(x, self._modules_of(self.out_indices))[1]

    def forward_features(self, x: Tensor) -> Tensor:
        """Run the stages, (N, in_chans, H, W) -> (N, num_features, H/32, W/32)."""
        return self._through(x)[0]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Run the head, (N, num_features, h, w) -> (N, num_classes).

        With `pre_logits` it gives what the classifier takes; maps where nothing pools.
        """
        x = self.hidden(self.global_pool(x))
        x = self.dropout(x.flatten(1) if self.global_pool.pool_type else x)
        return x if pre_logits else self.get_classifier()(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the last stage's output and the features, or the features alone.

        Args:
            x: images, (N, in_chans, H, W).
            indices: which features; a number means the last so many, None all. They come in the order of the stages.
            norm: has no effect, features are not normalised.
            stop_early: leave out the stages after the last feature.
            output_fmt: "NCHW".
            intermediates_only: leave the last stage's output out.

        Raises:
            UserError: another format, or indices of features that there are not.
        """
        if output_fmt != "NCHW":
            raise UserError(f"features come as NCHW, not {output_fmt}")
        names = self._modules_of(self._positions(indices))
        x, features = self._through(x, names, last=names[-1] if stop_early else None)
        return features if intermediates_only else (x, features)

    def _through(self, x: Tensor, names: Sequence[str] = (), *, last: str | None = None) -> tuple[Tensor, list[Tensor]]:
        """Run the stages up to `last`; return the output, and those of the stages named."""
        features = []
        x = self.stem(x)
        for name in self.stage_names:
            stage = self.get_submodule(name)
            for block in stage if self.use_checkpoint and isinstance(stage, nn.Sequential) else (stage,):
                x = checkpoint_forward(block, x, checkpointed=self.use_checkpoint)
            if name in names:
                features.append(x)
            if name == last:
                break
        return x, features

    def to_features(self, out_indices: int | Sequence[int]) -> Network:
        """Turn this network, in place, into one that gives a list of features; what it keeps, keeps its names.

        Args:
            out_indices: as `indices` of `forward_intermediates`.

        Raises:
            UserError: indices of features that there are not.
        """
        self.out_indices = self.prune_intermediate_layers(out_indices)
        every = [self.feature_info[index] for index in range(len(self.feature_info))]
        self.feature_info = FeatureInfo(every, tuple(self.out_indices))
        return self

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the stages after the last of these features, and the head; return the indices, none negative."""
        taken = self._positions(indices)
        (last,) = self._modules_of(taken[-1:])
        for name in self.stage_names[self.stage_names.index(last) + 1 :]:
            self.set_submodule(name, nn.Sequential())
        if prune_head:
            for name in self.hidden_names:
                self.set_submodule(name, nn.Identity())
            self.reset_classifier(0, "")
        return taken

    def _positions(self, indices: int | Sequence[int] | None) -> list[int]:
        """Return the indices of features, counted from the front and ascending."""
        every = range(len(self.feature_info))
        wanted = every if indices is None else range(-indices, 0) if isinstance(indices, int) else indices
        if not wanted or any(index not in range(-len(every), len(every)) for index in wanted):
            raise UserError(f"there are {len(every)} features, numbered from 0: {indices} are not among them")
        return sorted({every[index] for index in wanted})

    def _modules_of(self, indices: Iterable[int]) -> list[str]:
        """Return the names of the stages whose outputs these features are."""
        return [self.feature_info[index]["module"] for index in indices]

    def _set_features(self, channels: Sequence[int], strides: Sequence[int]) -> None:
        """Say that every stage's output is a feature, of so many channels, after so large a stride."""
        stages = zip(self.stage_names, channels, itertools.accumulate(strides, operator.mul), strict=True)
        self.feature_info = [
            {"num_chs": width, "reduction": reduction, "module": name} for name, width, reduction in stages
        ]
        self.num_features = channels[-1]

    def _add_head(self, channels: int) -> None:
        """Add pooling, dropout, and the classifier, which takes so many channels."""
        self.head_hidden_size = channels
        self.dropout = nn.Dropout(self.drop_rate)
        self.reset_classifier(self.num_classes, self._first_pool)

    def get_classifier(self) -> nn.Module:
        """Return the last linear layer; an identity where there are no classes."""
        return self.get_submodule(self.classifier_name)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a fresh classifier in the place of this one.

        Args:
            num_classes: outputs of the classifier; 0 = none.
            global_pool: "avg", "max", "avgmax" (the mean of both), "" = feature maps stay; None = as before.

        Raises:
            UserError: another pooling, or classes without one.
        """
        pool = self.global_pool.pool_type if global_pool is None else global_pool
        if pool not in POOLS:
            raise UserError(f"global_pool {pool!r} is none of {', '.join(map(repr, POOLS))}")
        if num_classes and not pool:
            raise UserError("a classifier takes pooled features: global_pool '' goes with num_classes 0")
        self.global_pool = SelectAdaptivePool2d(pool_type=pool)
        self.num_classes = num_classes
        like = next(self.parameters())
        classifier: nn.Module = nn.Identity()
        if num_classes:
            classifier = nn.Linear(self.head_hidden_size, num_classes, device=like.device, dtype=like.dtype)
        setattr(self, self.classifier_name, classifier.train(self.training))

    def __prepare_scriptable__(self) -> fx.GraphModule:
        """Return what `torch.jit.script` compiles: the operations of the forward pass, under the names of here.

        Raises:
            UserError: the branches of hs and csla modes are added up by operations that it does not know.
        """
        if any(isinstance(module, RepLayer) and module.mode != "target" for module in self.modules()):
            raise UserError("torch.jit.script takes a network in target mode, or one after repopt.deploy")
        traced = fx.symbolic_trace(self)
        for node in traced.graph.nodes:
            node.type = None  # annotations are text here, which it cannot read
        traced.recompile()
        return traced

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Set whether every block's activations are computed again in the backward pass instead of kept."""
        self.use_checkpoint = enable
