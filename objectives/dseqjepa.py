"""DSeq-JEPA, discriminative sequential joint-embedding prediction (arXiv 2511.17354).

I-JEPA with an order: the teacher says which regions of an image matter, and each region is predicted from all that
matter more; the background comes last.

    saliency = similarity of the teacher's class token to its patches, at one of its last blocks
    R_1 .. R_n = regions of high saliency, by falling saliency; R_(n+1) = all the rest
    step k: context = encoder(R_1 .. R_k), predicted = predictor(context, mask tokens at R_(k+1)), k = 1 .. n
    loss = smooth_l1 between predicted and layer_norm(teacher(image)), at R_(k+1) alone

A curriculum starts with I-JEPA's random blocks and ends with regions: lambda, the probability of regions, rises with
the step. It decides for a whole step (alike on all ranks), for a sample, or for a single region.

- A prediction depends on pixels of its own context and on nothing else of the image.
- An image without a region is predicted in random blocks; no region is ever empty, no prediction without context.
- `causal`: one pass of the encoder, in which a token sees regions up to its own, serves all steps. `reencode`: one
  pass for each step, in which the tokens of its context see one another.
- Each image counts the same, whatever its regions, so that neither ranks nor micro-batches change the loss.
- `contrastive_weight` adds VICReg between each image's mean prediction and mean target (the paper's "+ contrastive").
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor, nn

from prelude.data.batch import Batch
from prelude.data.errors import UserError
from prelude.objectives.blocks import step_draws
from prelude.objectives.contrastive_term import ContrastiveTerm
from prelude.objectives.ijepa import IJEPA, gather
from prelude.objectives.options import DSeqJEPAOptions
from prelude.objectives.patch_pictures import page, region_panels
from prelude.objectives.regions import Regions, find_regions, normalised_saliency, with_rectangles
from prelude.pretrain.config import EncoderConfig
from prelude.pretrain.draws import uniform
from prelude.pretrain.encoders import check_encoder, forward_tokens
from prelude.pretrain.feature_health import feature_health
from prelude.pretrain.images import denormalise
from prelude.pretrain.images import images as device_images
from prelude.pretrain.objective import Loss
from prelude.pretrain.schedules import Progress, linear
from prelude.pretrain.transfers import to_device

STEP_STREAM, SAMPLE_STREAM = 121, 122  # of pretrain.draws
_BUCKET = 16  # images of similar context that are encoded together, at least
_MAX_BUCKETS = 4
_MULTIPLE = 8  # padded lengths are multiples of this, for the sake of attention kernels


@dataclass(frozen=True)
class Prediction:
    """T target patches for each of b images, some of them padding."""

    predicted: Tensor  # (b, T, D)
    target: Tensor  # (b, T, D)
    weight: Tensor  # (b, T): of each patch in its image's loss; 0 for padding; they add up to 1 over an image
    rows: Tensor  # (b,): which images of the batch these are
    agreement: Tensor  # (b,): of encoder and teacher about the context
    step: Tensor | None = None  # (b, T) int64: k of the prediction; None for random blocks
    background: Tensor | None = None  # (b, T) bool


class DSeqJEPA(IJEPA):
    Options = DSeqJEPAOptions
    contrast = ContrastiveTerm
    host_waits = 1  # for the lengths that packing needs; once more for an image that all rounds of labelling leave open

    def __init__(self, encoder: nn.Module, options: DSeqJEPAOptions, *, image_size, mean, std):
        super().__init__(encoder, options, image_size=image_size, mean=mean, std=std)
        self.saliency_block = _saliency_block(options, len(encoder.blocks))

    @classmethod
    def check(cls, options: DSeqJEPAOptions, encoder: EncoderConfig) -> None:
        super().check(options, encoder)
        summary = check_encoder(encoder, tokens=True)
        if summary.depth is None:
            raise UserError(
                f"objective.name=dseqjepa reads the class token and the patches of one of the teacher's blocks, which "
                f"encoder.name={encoder.name} does not offer; write a timm VisionTransformer, or objective.name=ijepa."
            )
        if not summary.has_class_token:
            raise UserError(
                f"objective.name=dseqjepa needs a class token, which encoder.name={encoder.name} has not; "
                "write encoder.kwargs={class_token: true, global_pool: avg, fc_norm: false}."
            )
        if not 0 <= _saliency_block(options, summary.depth) < summary.depth:
            raise UserError(
                f"objective.saliency_block={options.saliency_block} is none of the {summary.depth} blocks of "
                f"encoder.name={encoder.name}, numbered from 0; write objective.saliency_block=auto."
            )
        num_patches = summary.grid[0] * summary.grid[1]
        if options.num_regions > num_patches:
            raise UserError(
                f"objective.num_regions={options.num_regions} is more than the {num_patches} patches of an image; "
                f"write objective.num_regions={min(5, num_patches)}."
            )

    def forward(self, batch: Batch, progress: Progress) -> Loss:
        (images,) = device_images(batch, self.views)  # (B, C, H, W)
        features, saliency = self.look(images)
        target = self.normalised(features)
        regions = self.choose(saliency, batch.seeds, progress)
        predictions = []
        in_blocks = list(range(len(images)))
        if regions is not None:
            sizes, on_host, complete = self.sizes_on_host(regions)
            if not complete:
                regions = self.choose(saliency, batch.seeds, progress, rounds=saliency.shape[1])
                sizes, on_host, _ = self.sizes_on_host(regions)
            in_blocks = [row for row in in_blocks if _num_steps(on_host[row]) == 0]
            for rows in _buckets(on_host):
                chosen = to_device(rows, images.device)
                some = Regions(regions.rid[chosen], regions.count[chosen])
                found = self.predict_regions(images[chosen], target[chosen], some, [on_host[row] for row in rows])
                predictions += [replace(p, rows=chosen[p.rows]) for p in found]
        if in_blocks:
            chosen = to_device(in_blocks, images.device)
            found = self._in_blocks(images[chosen], target[chosen], batch.seeds[chosen], progress)
            predictions.append(replace(found, rows=chosen))
        errors = [self.error(p.predicted, p.target) for p in predictions]
        total = sum((error * p.weight).sum() for error, p in zip(errors, predictions, strict=True)) / len(images)
        parts = feature_health(features.mean(1)) | {
            "teacher_cosine": torch.cat([p.agreement for p in predictions]).mean(),
            "lambda": images.new_full((), self.curriculum(progress)),
        }
        if regions is not None:
            parts |= self._region_statistics(predictions, errors, regions, sizes)
        if self.options.contrastive_weight:
            contrastive = self.vicreg(*_pooled(predictions, len(images)))
            parts |= {"prediction": total.detach(), "contrastive": contrastive.detach()}
            total = total + self.options.contrastive_weight * contrastive
        return Loss(total, parts)

    def sizes_on_host(self, regions: Regions) -> tuple[Tensor, list[list[int]], bool]:
        """Patches of each region, (B, R) and as lists, and whether the regions are final.

        Lengths decide shapes, so the host waits for the device here, once, and nowhere else.
        """
        sizes = regions.sizes(self.options.num_regions - 1)
        if regions.complete is None:
            return sizes, sizes.tolist(), True
        *flat, complete = torch.cat([sizes.flatten(), regions.complete[None].long()]).tolist()
        most = sizes.shape[1]
        return sizes, [flat[start : start + most] for start in range(0, len(flat), most)], bool(complete)

    # ---- what is predicted from what

    @torch.no_grad()
    def look(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's features of every patch, (B, N, D), and how salient it finds each, (B, N) in [0, 1]."""
        tokens, [(patches, prefix)] = self.teacher.forward_intermediates(
            images, indices=[self.saliency_block], return_prefix_tokens=True, norm=True, output_fmt="NLC"
        )
        with torch.autocast(images.device.type, enabled=False):
            contextual = self.options.saliency_query == "contextual"
            query = prefix[:, :1] if contextual else self.teacher.cls_token
            patches = patches.to(torch.promote_types(patches.dtype, torch.float32))
            # Summed within each image alone: how many images share the batch must not change a bit of it.
            similarity = (patches * query.to(patches.dtype)).sum(-1) / patches.shape[-1] ** 0.5
            return tokens[:, self.num_prefix :], normalised_saliency(similarity)

    def find(self, saliency: Tensor, rounds: int | None = None) -> Regions:
        """The regions of each image. saliency: (B, N); rounds: as for `find_regions`."""
        o = self.options
        return find_regions(
            saliency,
            self.grid,
            num_regions=o.num_regions,
            min_area=o.region_min_area,
            strategy=o.region_strategy,
            rounds=rounds,
        )

    def curriculum(self, progress: Progress) -> float:
        """Lambda of the next step."""
        return linear(self.options.lambda_start, self.options.lambda_end, progress.fraction)

    @torch.no_grad()
    def choose(self, saliency: Tensor, seeds: Tensor, progress: Progress, rounds: int | None = None) -> Regions | None:
        """The regions that this step predicts; an image with n = 0 gets random blocks, and all do where None."""
        probability, granularity = self.curriculum(progress), self.options.lambda_granularity
        if granularity == "step":
            (draw,) = step_draws(self.salt, progress.step, 1, STEP_STREAM)
            return self.find(saliency, rounds) if draw < probability else None
        regions = self.find(saliency, rounds)
        if granularity == "sample":
            sequential = uniform(seeds, 1, SAMPLE_STREAM)[:, 0] < probability
            count = torch.where(sequential, regions.count, 0)
            return Regions(torch.where(sequential[:, None], regions.rid, 1), count, regions.complete)
        size = self.blocks.sizes(progress.step).target
        most = self.options.num_regions - 1
        return with_rectangles(regions, seeds, self.grid, most=most, acceptance=probability, size=size)

    # ---- prediction in order

    def predict_regions(
        self, images: Tensor, target: Tensor, regions: Regions, sizes: list[list[int]]
    ) -> list[Prediction]:
        """All steps of images that have at least one region. `sizes`: patches of each region, on the host."""
        by_region = regions.rid.argsort(dim=1, stable=True)  # (b, N): the context of any step comes first
        if self.options.context == "causal":
            return [self._causal(images, target, regions, by_region, sizes)]
        steps = range(1, max(map(_num_steps, sizes)) + 1)
        return [self._reencoded(images, target, regions, by_region, sizes, step) for step in steps]

    def _causal(self, images, target, regions: Regions, by_region: Tensor, sizes) -> Prediction:
        """All steps at once. A token of the context sees regions up to its own; a mask token of region m sees
        context of regions before m, and its like.

        What is too long for an image needs no mask of its own: surplus context is background, which no context and
        no mask token sees, and surplus mask tokens are at region 1, which no other mask token sees.
        """
        num_patches = by_region.shape[1]
        num_context = max(num_patches - row[_num_steps(row)] for row in sizes)
        num_targets = max(num_patches - row[0] for row in sizes)
        context_ids, target_ids = by_region[:, : _padded(num_context, num_patches)], by_region[:, -num_targets:]
        known, asked = regions.rid.gather(1, context_ids), regions.rid.gather(1, target_ids)
        # Prefix tokens belong to region 1, which is part of every context; later regions must not pass through them.
        group = torch.cat([torch.ones_like(known[:, : self.num_prefix]), known], dim=1)
        context = self._encode(images, context_ids, group[:, None, :] <= group[:, :, None])
        visible = torch.cat(
            [
                torch.cat([_not_after(known, known), _nothing(known, asked)], dim=2),
                torch.cat([_before(known, asked), asked[:, :, None] == asked[:, None, :]], dim=2),
            ],
            dim=1,
        )  # (b, K + T, K + T): rows see columns
        predicted = self._predicted(context, context_ids, target_ids, visible[:, None])
        rows = torch.arange(len(images), device=images.device)
        agreement = self.agreement(context, target, context_ids)
        return self._prediction(predicted, target, target_ids, asked, regions, rows, agreement)

    def _reencoded(self, images, target, regions: Regions, by_region: Tensor, sizes, step: int) -> Prediction:
        """Step k alone, of the images that have it: context and mask tokens all see one another."""
        rows = [row for row, size in enumerate(sizes) if _num_steps(size) >= step]
        chosen = to_device(rows, images.device)
        regions, by_region = Regions(regions.rid[chosen], regions.count[chosen]), by_region[chosen]
        num_patches = by_region.shape[1]
        num_context = _padded(max(sum(sizes[row][:step]) for row in rows), num_patches)
        num_targets = max(sizes[row][step] for row in rows)
        context_ids = by_region[:, :num_context]
        known = regions.rid.gather(1, context_ids) <= step  # (b, K)
        first = (regions.rid <= step).sum(1, keepdim=True)  # where the target begins in the order of regions
        place = first + torch.arange(num_targets, device=images.device)
        target_ids = by_region.gather(1, place.clamp(max=num_patches - 1))
        asked = regions.rid.gather(1, target_ids)
        asked = torch.where((place < num_patches) & (asked == step + 1), asked, 1)  # 1: padding
        always = known.new_ones(len(rows), self.num_prefix)
        context = self._encode(images[chosen], context_ids, torch.cat([always, known], dim=1)[:, None, :])
        visible = torch.cat([known, asked > 1], dim=1)[:, None, None, :]  # (b, 1, 1, K + T): columns that all see
        predicted = self._predicted(context, context_ids, target_ids, visible)
        agreement = self.agreement(context, target[chosen], context_ids)
        return self._prediction(predicted, target[chosen], target_ids, asked, regions, chosen, agreement)

    def _encode(self, images: Tensor, ids: Tensor, visible: Tensor) -> Tensor:
        return forward_tokens(self.encoder, images, ids, visible)[:, self.num_prefix :]

    def _predicted(self, context: Tensor, context_ids: Tensor, target_ids: Tensor, visible: Tensor) -> Tensor:
        checkpointing = self.encoder.grad_checkpointing
        return self.predictor(context, context_ids, target_ids[:, None], visible, checkpointing=checkpointing)[:, 0]

    def _prediction(
        self, predicted, target, target_ids, asked: Tensor, regions: Regions, rows: Tensor, agreement: Tensor
    ) -> Prediction:
        """asked: (b, T), the region of each target patch; 1 marks padding, because region 1 is never a target."""
        sizes = regions.sizes(self.options.num_regions - 1)  # (b, R)
        if self.options.loss_reduction == "patch":
            share = (target.shape[1] - sizes[:, :1]).expand_as(asked)
        else:
            share = regions.count[:, None] * sizes.gather(1, asked - 1)
        weight = torch.where(asked > 1, 1 / share.clamp(min=1).to(target.dtype), 0)
        background = asked == regions.count[:, None] + 1
        return Prediction(predicted, gather(target, target_ids), weight, rows, agreement, asked - 1, background)

    def _in_blocks(self, images: Tensor, target: Tensor, seeds: Tensor, progress: Progress) -> Prediction:
        """I-JEPA's prediction of the same images."""
        masks = self.blocks.draw(seeds, progress.step)
        context = self.encode_context(images, masks)
        predicted = self.predict_targets(context, masks).flatten(1, 2)  # (b, M * T, D)
        ids = masks.targets.flatten(1)
        rows = torch.arange(len(images), device=images.device)
        weight = target.new_full(ids.shape, 1 / ids.shape[1])
        return Prediction(predicted, gather(target, ids), weight, rows, self.agreement(context, target, masks.context))

    # ---- what is logged and drawn

    @torch.no_grad()
    def _region_statistics(self, predictions, errors, regions: Regions, sizes: Tensor) -> dict[str, Tensor]:
        """Of this rank's micro-batch: how many regions images have and how large they are, the loss of each step,
        and the background's share in the loss of images with regions."""
        most, found = self.options.num_regions - 1, {}
        having = regions.count > 0
        for n in range(most + 1):
            found[f"images_with_{n}_regions"] = (regions.count == n).float().mean()
        shares = torch.where(
            torch.arange(most + 1, device=sizes.device) < regions.count[:, None], sizes / sizes.sum(1, keepdim=True), 0
        )
        for k in range(1, most + 1):
            present = (regions.count >= k).sum().clamp(min=1)
            found[f"region_{k}_share"] = shares[:, k - 1].sum() / present
        ordered = [(p, e) for p, e in zip(predictions, errors, strict=True) if p.step is not None]
        for k in range(1, most + 1):
            here = [((p.step == k), e) for p, e in ordered]
            if here:
                count = sum(where.sum() for where, _ in here).clamp(min=1)
                found[f"loss_step_{k}"] = sum((e * where).sum() for where, e in here) / count
        weighted = [(e * p.weight, p.background) for p, e in ordered]
        if weighted:
            background = sum((w * where).sum() for w, where in weighted)
            found["background_in_loss"] = background / sum(w.sum() for w, _ in weighted).clamp(min=1e-12)
        found["images_in_order"] = having.float().mean()
        return found

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Image.Image]:
        """`regions`: one row an image: the image, its saliency, its regions in order, and context and target of each
        step. `blocks`: the random blocks of the curriculum's beginning."""
        pictures = super().pictures(batch)
        (images,) = device_images(batch.head(6), self.views)
        _, saliency = self.look(images)
        regions = self.find(saliency)
        pixels, saliency, rid = denormalise(images, self.views).cpu(), saliency.cpu(), regions.rid.cpu()
        rows = [region_panels(pixels[i], self.grid, saliency[i], rid[i]) for i in range(len(pixels))]
        return {"regions": page(rows)} | pictures


def _saliency_block(options: DSeqJEPAOptions, depth: int) -> int:
    return max(depth - 2, 0) if options.saliency_block == "auto" else options.saliency_block


def _pooled(predictions: list[Prediction], num_images: int) -> tuple[Tensor, Tensor]:
    """Each image's mean prediction and mean target, weighted as in the loss. Returns (B, D), (B, D)."""
    means = []
    for side in ("predicted", "target"):
        rows = [(p.rows, (getattr(p, side) * p.weight[..., None]).sum(1)) for p in predictions]  # (b, D)
        mean = rows[0][1].new_zeros(num_images, rows[0][1].shape[1])
        means.append(mean.index_add(0, torch.cat([ids for ids, _ in rows]), torch.cat([values for _, values in rows])))
    return means[0], means[1]


def _num_steps(sizes: list[int]) -> int:
    """n of an image with regions of these sizes: all but the last one are context."""
    return sum(size > 0 for size in sizes) - 1


def _buckets(sizes: list[list[int]]) -> Iterator[list[int]]:
    """Images with regions, those of similar context together, so that little is padded: rows of the batch."""
    rows = [row for row, size in enumerate(sizes) if _num_steps(size) > 0]
    rows.sort(key=lambda row: sizes[row][_num_steps(sizes[row])], reverse=True)  # much background is little context
    count = min(max(len(rows) // _BUCKET, 1), _MAX_BUCKETS)
    for nth in range(count):
        bucket = rows[nth * len(rows) // count : (nth + 1) * len(rows) // count]
        if bucket:
            yield bucket


def _padded(length: int, most: int) -> int:
    return min(-(-length // _MULTIPLE) * _MULTIPLE, most)


def _not_after(keys: Tensor, queries: Tensor) -> Tensor:
    return keys[:, None, :] <= queries[:, :, None]


def _before(keys: Tensor, queries: Tensor) -> Tensor:
    return keys[:, None, :] < queries[:, :, None]


def _nothing(queries: Tensor, keys: Tensor) -> Tensor:
    return torch.zeros(*queries.shape, keys.shape[1], dtype=torch.bool, device=queries.device)
