"""What people write from other tools, and the name that it has here."""

_SAME = {
    "optimizer.lr": "lr learning_rate base_lr blr max_lr peak_lr",
    "optimizer.name": "optim opt optimizer_name",
    "optimizer.weight_decay": "weight_decay wd decay",
    "optimizer.betas": "betas beta1 beta2 adam_beta1 adam_beta2 opt_betas",
    "optimizer.warmup_epochs": "warmup warmup_epochs warm_up num_warmup_epochs lr_warmup_epochs",
    "optimizer.min_lr": "min_lr final_lr eta_min end_lr lr_min",
    "optimizer.warmup_lr": "warmup_lr start_lr warmup_start_lr lr_warmup_init",
    "optimizer.milestones": "milestones lr_steps decay_epochs",
    "train.global_batch": "batch_size bs batch total_batch_size global_batch_size train_batch_size "
    "effective_batch_size",
    "train.micro_batch": "micro_batch_size per_device_batch_size batch_size_per_gpu batch_size_per_device accum_iter "
    "per_device_train_batch_size gradient_accumulation_steps accumulate_grad_batches grad_accum samples_per_gpu",
    "train.epochs": "epochs epoch num_epochs max_epochs n_epochs num_train_epochs total_epochs",
    "train.precision": "precision amp fp16 bf16 bfloat16 mixed_precision dtype use_amp half use_bfloat16",
    "train.gradient_clipping": "clip_grad grad_clip max_grad_norm gradient_clip_val clip_grad_norm gradient_clip_norm",
    "train.zero_stage": "zero zero_stage stage zero_optimization",
    "train.gradient_checkpointing": "grad_checkpointing use_checkpoint activation_checkpointing",
    "train.compile": "compile torch_compile torchcompile",
    "data.shards": "data_path data_dir dataset train_data data_root root root_path train_shards urls path image_folder",
    "data.num_workers": "num_workers workers n_workers dataloader_num_workers",
    "data.num_samples": "num_samples train_num_samples epoch_length dataset_size",
    "data.channels": "in_chans in_channels num_channels channels input_channels n_channels",
    "data.std": "stdev image_std",
    "data.mean": "image_mean",
    "run_dir": "output_dir out output save_dir log_dir logdir work_dir out_dir default_root_dir exp_dir folder",
    "encoder.name": "model arch backbone model_name architecture encoder_name",
    "encoder.image_size": "img_size input_size crop_size resolution image_size size",
    "encoder.patch_size": "patch_size patch",
    "encoder.kwargs.drop_path_rate": "drop_path drop_path_rate",
    "encoder.kwargs.depth": "depth num_layers",
    "encoder.kwargs.embed_dim": "embed_dim hidden_size width",
    "encoder.kwargs.num_heads": "num_heads num_attention_heads",
    "objective.name": "method loss algorithm",
    "checkpoint.every_steps": "save_every save_freq save_steps save_interval ckpt_every checkpoint_freq save_ckpt_freq",
    "checkpoint.keep": "save_total_limit save_top_k keep_last num_checkpoints",
    "log.every_steps": "log_every log_freq logging_steps log_interval print_freq log_every_n_steps",
    "resume.checkpoint": "resume_from ckpt ckpt_path resume_from_checkpoint checkpoint_path resume_path",
    "log.wandb.project": "wandb use_wandb wandb_project project",
    "log.wandb.entity": "wandb_entity entity",
    "log.wandb.mode": "wandb_mode",
    "log.mlflow.experiment": "mlflow use_mlflow mlflow_experiment experiment experiment_name",
    "log.mlflow.tracking_uri": "mlflow_tracking_uri tracking_uri",
    "evaluate.every_steps": "eval_every eval_freq eval_steps eval_interval",
    "seed": "seed random_seed manual_seed",
}
_OTHERWISE = {
    "a run is as long as train.epochs says; write train.epochs = steps x train.global_batch / images": "max_steps "
    "num_steps total_steps train_steps max_train_steps steps iterations max_iters num_iterations total_iterations",
    "its length is counted in epochs; write optimizer.warmup_epochs": "warmup_steps num_warmup_steps warmup_iters "
    "warmup_ratio",
    "a run goes on from its own checkpoint, encoder.weights=SOURCE starts it from weights that exist, and `prelude "
    "finetune` trains these with labels": ""
    "pretrained checkpoint_dir weights init_weights init_from pretrained_weights load_from",
    "a run writes metrics.jsonl and tensorboard/ into run_dir, and to Weights & Biases or MLflow where "
    "log.wandb.project or log.mlflow.experiment is set; write one of these, or leave it out": "neptune comet clearml "
    "aim logger loggers report_to tensorboard",
    "an encoder has no classifier here, and `prelude finetune` counts the classes; leave it out": "num_classes "
    "nb_classes num_labels n_classes",
    "the launcher says on how many devices a run is; write deepspeed --num_gpus N --module prelude.launch.pretrain": ""
    "gpus num_gpus devices nodes num_nodes world_size ngpus ngpus_per_node strategy accelerator",
    "the learning rate falls by a cosine, or at optimizer.milestones; write one of their settings": "scheduler "
    "lr_scheduler lr_scheduler_type sched schedule",
}
NAMES = {word: key for key, words in _SAME.items() for word in words.split()}
SENTENCES = {word: sentence for sentence, words in _OTHERWISE.items() for word in words.split()}
