"""Adapters and trainers: one step each with PEFT, Trainer, accelerate and TRL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
accelerate = pytest.importorskip("accelerate")

from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments  # noqa: E402

from nsagen.core.errors import InvalidInputError  # noqa: E402
from nsagen.integrations.transformers import apply_nsa  # noqa: E402
from tests.integrations.tiny import dense, distance, sparse, tokens, trained  # noqa: E402

DOCUMENTS = [tokens(n, seed=n).tolist() for n in (21, 9, 30, 14)]
PARTS = ("compress_key", "compress_value", "intra_block_pe", "gate")


@pytest.fixture
def model() -> Any:
    return trained(sparse(compress_type="linear"))


def loss_alone(model: Any) -> float:
    """The mean over the tokens of all documents, each in a batch of one."""
    with torch.no_grad():
        losses = [
            (model(torch.tensor([d]), labels=torch.tensor([d])).loss.item(), len(d) - 1)
            for d in DOCUMENTS
        ]
    return sum(loss * count for loss, count in losses) / sum(count for _, count in losses)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(tokens(2, 30)).logits


class TestAdapters:
    def config(self, **changes: Any) -> Any:
        wanted = {
            "r": 2,
            "target_modules": ["q_proj", "v_proj", "gate"],
            "init_lora_weights": False,
        }
        return peft.LoraConfig(task_type="CAUSAL_LM", **{**wanted, **changes})

    def test_lora_with_modules_to_save(self, tmp_path: Path, model: Any) -> None:
        """A step, generate, save, load by the Auto class, merge: always the same logits."""
        model.save_pretrained(tmp_path / "base")
        base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        saved = ["compress_key", "compress_value", "intra_block_pe"]
        adapted = peft.get_peft_model(base, self.config(modules_to_save=saved))
        ids = tokens(2, 30)
        optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], 0.1)
        adapted(input_ids=ids, labels=ids).loss.backward()
        missing = [n for n, p in adapted.named_parameters() if p.requires_grad and p.grad is None]
        assert not missing
        optimizer.step()
        adapted.eval()
        expected = logits(adapted)
        assert distance(expected, logits(model)) > 1e-3
        wanted = {"max_new_tokens": 6, "do_sample": False}
        with torch.no_grad():
            cached, plain = (
                adapted.generate(input_ids=ids, use_cache=use, **wanted) for use in (True, False)
            )
        assert torch.equal(cached, plain)
        adapted.save_pretrained(tmp_path / "adapter")
        again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
        assert distance(logits(again), expected) < 1e-6
        assert distance(logits(again.merge_and_unload()), expected) < 1e-5

    def test_lora_on_parameters_of_compression(self, model: Any) -> None:
        names = [f"{name}.weight" for name in PARTS[:2]]
        plain = logits(model)
        adapted = peft.get_peft_model(model, self.config(target_parameters=names)).eval()
        assert distance(logits(adapted), plain) > 1e-4
        adapted(input_ids=tokens(2, 30), labels=tokens(2, 30)).loss.backward()
        of_keys = [p for n, p in adapted.named_parameters() if "compress_key" in n and "lora" in n]
        assert of_keys
        assert all(p.grad is not None and p.grad.norm() > 0 for p in of_keys)

    def test_dora_of_gates_that_are_still_0(self) -> None:
        """It divides by the norm of each row, which would give NaN."""
        inputs = {"input_ids": tokens(2, 20), "labels": tokens(2, 20)}
        config = self.config(target_modules=["q_proj", "gate"], use_dora=True)
        with pytest.raises(InvalidInputError, match=r"gate\.weight: must not be 0 under DoRA"):
            peft.get_peft_model(sparse(), config)(**inputs)
        assert peft.get_peft_model(trained(sparse()), config)(**inputs).loss.isfinite()
        of_queries = self.config(target_modules=["q_proj"], use_dora=True)
        assert peft.get_peft_model(sparse(), of_queries)(**inputs).loss.isfinite()

    @torch.no_grad()
    def test_layers_that_lora_replicates(self, model: Any) -> None:
        adapted = peft.get_peft_model(model, self.config(layer_replication=[(0, 2), (1, 2)])).eval()
        wanted = {"input_ids": tokens(2, 20), "max_new_tokens": 5, "do_sample": False}
        texts = [adapted.generate(**wanted, use_cache=use) for use in (True, False)]
        assert torch.equal(*texts)

    @torch.no_grad()
    def test_rows_with_adapters_of_their_own(self, model: Any) -> None:
        """A padded batch with `adapter_names` is each row with its adapter."""
        config = self.config(target_modules=["q_proj", "v_proj", "o_proj", "gate"])
        adapted = peft.get_peft_model(model, config, adapter_name="a")
        adapted.add_adapter("b", config)
        adapted.eval()
        ids, mask, names = tokens(2, 20), torch.ones(2, 20, dtype=torch.long), ["a", "b"]
        mask[1, :4] = 0
        inputs = {"input_ids": ids, "attention_mask": mask, "adapter_names": names}
        mixed = adapted(**inputs).logits
        wanted = {"max_new_tokens": 3, "do_sample": False}
        texts = [adapted.generate(**inputs, use_cache=use, **wanted) for use in (True, False)]
        assert torch.equal(*texts)
        for row, (name, start) in enumerate(zip(names, (0, 4), strict=True)):
            adapted.set_adapter(name)
            alone = adapted(input_ids=ids[row : row + 1, start:]).logits
            assert distance(mixed[row, start:], alone[0]) < 1e-5
        assert distance(adapted(input_ids=ids[:1]).logits[0], mixed[0]) > 1e-3

    @pytest.mark.parametrize(
        "parts",
        [{"modules_to_save": ["compress_key"]}, {"target_parameters": ["compress_key.weight"]}],
    )
    def test_rows_with_compression_of_their_own_are_refused(self, model: Any, parts: Any) -> None:
        adapted = peft.get_peft_model(model, self.config(**parts), adapter_name="a").eval()
        layer = model.model.layers[0].register_forward_pre_hook(lambda *_: pytest.fail("too late"))
        for length in (1, 20):
            with pytest.raises(InvalidInputError, match=r"adapter_names: .* adapter of compress_k"):
                adapted(input_ids=tokens(2, length), adapter_names=["a", "__base__"])
        layer.remove()

    @torch.no_grad()
    def test_an_adapter_that_starts_at_its_invocation(self, model: Any) -> None:
        """aLoRA leaves the tokens before it as they were, in each row from another token on."""
        ids, starts = tokens(2, 20), (6, 13)
        for row, start in zip(ids, starts, strict=True):
            row[start : start + 2] = torch.tensor([5, 6])
        plain = model(ids).logits
        config = self.config(alora_invocation_tokens=[5, 6])
        adapted = peft.get_peft_model(model, config).eval()
        logits = adapted(input_ids=ids).logits
        for row, start in enumerate(starts):
            assert distance(logits[row, :start], plain[row, :start]) < 1e-5
            assert distance(logits[row, start:], plain[row, start:]) > 1e-3
            alone = adapted(input_ids=ids[row : row + 1]).logits[0]
            assert distance(logits[row], alone) < 1e-5
        text = adapted.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
        expected = adapted(input_ids=text).logits[:, 19:-1].argmax(-1)
        assert torch.equal(text[:, 20:], expected)

    def test_every_part_is_a_module(self, model: Any) -> None:
        attention = dict(model.model.layers[0].self_attn.named_children())
        assert set(PARTS) <= set(attention)

    def test_prompts_in_front_of_the_input(self, model: Any) -> None:
        """Prompt tuning passes embeddings and a longer mask."""
        tuned = peft.get_peft_model(
            model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
        )
        ids = tokens(2, 20)
        tuned(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
        assert tuned.prompt_encoder.default.embedding.weight.grad.norm() > 0

    @torch.no_grad()
    def test_prompt_tuning_generates_without_a_cache(self, model: Any) -> None:
        """With one, PEFT calls the model otherwise than it does in forward."""
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
        tuned, ids = peft.get_peft_model(model, config).eval(), tokens(2, 20)
        wanted = {"input_ids": ids, "max_new_tokens": 3, "do_sample": False}
        mask = torch.ones_like(ids)
        text = tuned.generate(**wanted, attention_mask=mask, use_cache=False)
        expected = tuned(input_ids=text).logits[:, 24:-1].argmax(-1)
        assert torch.equal(text[:, 20:], expected)
        mask[1, :4] = 0
        with pytest.raises(InvalidInputError, match="attention_mask: must be"):
            tuned.generate(**wanted, attention_mask=mask)

    def test_a_dense_model_with_adapters_is_not_swapped(self) -> None:
        """Its adapters would be saved without NSA, for the dense model's folder."""
        one = dense()
        tuned = peft.get_peft_model(one, peft.LoraConfig(target_modules=["q_proj"]))
        with pytest.raises(InvalidInputError, match="must be a PreTrainedModel, got PeftModel"):
            apply_nsa(tuned)
        with pytest.raises(InvalidInputError, match=r"no adapters.*self_attn.q_proj.*swap the mod"):
            apply_nsa(one)
        apply_nsa(tuned.merge_and_unload())

    def test_a_prefix_in_a_dense_cache_is_refused(self, model: Any) -> None:
        tuned = peft.get_peft_model(
            model, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
        )
        with pytest.raises(InvalidInputError, match="that holds tokens"):
            tuned(input_ids=tokens(2, 20), attention_mask=torch.ones(2, 20, dtype=torch.long))


def arguments(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "learning_rate": 0.0,
        "save_strategy": "no",
        "disable_tqdm": True,
        **changes,
    }


def logged(trainer: Any) -> float:
    return next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)


@pytest.mark.parametrize("ends", [False, True])
def test_the_trainer_with_documents_flattened_into_a_row(
    tmp_path: Path, model: Any, ends: bool
) -> None:
    more = {"return_flash_attn_kwargs": True, "return_seq_idx": True} if ends else {}
    data = [{"input_ids": document} for document in DOCUMENTS]
    trainer = Trainer(
        model,
        TrainingArguments(**arguments(tmp_path)),
        train_dataset=data,  # type: ignore[arg-type]
        data_collator=DataCollatorWithFlattening(return_tensors="pt", **more),
    )
    expected = loss_alone(model)
    trainer.train()
    assert logged(trainer) == pytest.approx(expected, abs=2e-4)  # the log has four digits


def test_accelerate(model: Any) -> None:
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="no")
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    ids, mask = torch.zeros(4, 30, dtype=torch.long), torch.zeros(4, 30, dtype=torch.long)
    labels = torch.full((4, 30), -100)
    for row, document in enumerate(DOCUMENTS):
        ids[row, : len(document)] = labels[row, : len(document)] = torch.tensor(document)
        mask[row, : len(document)] = 1
    before = loss_alone(model)
    loss = wrapped(input_ids=ids, attention_mask=mask, labels=labels).loss
    assert loss.item() == pytest.approx(before, rel=1e-5)
    accelerator.backward(loss)
    optimizer.step()
    assert loss_alone(model) < before


@pytest.mark.parametrize("packing", [True, False])
def test_trl_with_packing(tmp_path: Path, model: Any, packing: bool) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    config = trl.SFTConfig(
        **arguments(tmp_path, per_device_train_batch_size=1 if packing else 4),
        packing=packing,
        max_length=80,
        dataset_kwargs={"skip_prepare_dataset": False},
        bf16=False,
        gradient_checkpointing=False,
    )
    words = {"<unk>": 0, **{f"w{i}": i for i in range(1, 97)}}
    from tokenizers import Tokenizer, models

    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")),
        unk_token="<unk>",
        pad_token="<unk>",
        eos_token="w96",
    )
    data = datasets.Dataset.from_dict({"input_ids": DOCUMENTS})
    expected = loss_alone(model)
    trainer = trl.SFTTrainer(model, args=config, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    assert logged(trainer) == pytest.approx(expected, abs=2e-3)
