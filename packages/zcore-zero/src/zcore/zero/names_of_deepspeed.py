"""What DeepSpeed has, and zcore under another name or not at all: what to write in its place."""

__all__ = ["refused_argument", "what_to_write"]

INSTEAD = {
    "allreduce_gradients": "nothing: backward() reduces them",
    "clip_fp32_gradients": '"gradient_clipping" in the config',
    "compile": "block.compile() on the blocks",
    "cuda": "nothing: the model is where the mesh's device is",
    "cur_scale": "engine.loss_scale",
    "dp_world_size": "engine.sharding.dp.size",
    "destroy": "engine.close()",
    "empty_partition_cache": "nothing: what was gathered is free after a step",
    "eval_batch": "engine(...) in a loop of your own, after engine.eval()",
    "forward": "engine(...)",
    "generate": "engine.module.generate(...)",
    "get_mom": "the momenta in engine.optimizer.param_groups",
    "gradient_accumulation_steps": "engine.config.gradient_accumulation_steps",
    "load_state_dict": "model.load_state_dict() before `zero.initialize`, or engine.load_checkpoint(folder)",
    "local_rank": "int(os.environ['LOCAL_RANK'])",
    "modules": "engine.module.modules()",
    "monitor": "`events=` of `zero.initialize`",
    "named_parameters": "engine.module.named_parameters()",
    "optimizer_name": "type(engine.optimizer).__name__",
    "parameters": "engine.module.parameters()",
    "save_16bit_model": "engine.consolidated_state_dict(), and safetensors.torch.save_file()",
    "save_fp16_model": "engine.consolidated_state_dict(), and safetensors.torch.save_file()",
    "set_gradient_accumulation_boundary": "engine.zero_grad(), which drops a step that is not whole",
    "set_lr": "the learning rates in engine.optimizer.param_groups",
    "set_train_batch_size": "another config: an engine keeps its batch sizes",
    "state_dict": "engine.consolidated_state_dict()",
    "to": "nothing: the model is where the mesh's device is",
    "train_batch": "engine(...), engine.backward(loss) and engine.step() in a loop of your own",
    "train_batch_size": "engine.config.train_batch_size",
    "train_micro_batch_size_per_gpu": "engine.config.train_micro_batch_size_per_gpu",
    "training": "engine.module.training",
    "world_size": "torch.distributed.get_world_size()",
    "zero_optimization_stage": "engine.config.zero_optimization.stage",
}


def what_to_write(name: str) -> str | None:
    """In place of attribute `name` of DeepSpeed's engine; None where nothing is known of it."""
    return INSTEAD.get(name)


ARGUMENTS = {
    "args": "leave it out, and pass the path of the config as `config=`",
    "collate_fn": "build your own DataLoader",
    "config_params": "pass it as `config=`",
    "dist_init_required": "leave it out: the process group is joined where there is none",
    "distributed_port": "leave it out: the launcher (torchrun) tells it",
    "mesh_param": "build a mesh and pass it as `mesh=`",
    "mpu": "build a mesh and pass it as `mesh=`",
    "training_data": "build your own DataLoader, with a DistributedSampler",
}


def refused_argument(name: str) -> str:
    """The words for an argument that `zero.initialize` does not take."""
    advice = ARGUMENTS.get(name)
    told = f", as DeepSpeed's does: {advice}" if advice else ""
    taken = "model, config, optimizer, lr_scheduler, model_parameters, mesh and events"
    return f"zero.initialize takes no argument {name!r}{told}. It takes {taken}."
