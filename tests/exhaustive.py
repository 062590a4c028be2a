"""What `make test` leaves to `make test-all`: the rest of matrices of which it runs a representative.

Each row is a file and a regular expression for the names of its tests. Every row has a representative in `make test`:
the same check for another strategy, family, shape or benchmark, or of the parts of a whole command. A file stands
without an expression where its representative is in another one. Continuous integration runs the rest, too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

EXHAUSTIVE = (
    # Kills and signals under the command: a rank that is killed stays, among forks; one of interpreters of its own is
    # here. In one process, or in those of the session, are a save that is killed at each of its writes
    # (strategies/test_atomic_checkpoint.py), a signal (training/test_preemption.py) and a stop that one rank asks for
    # (callbacks/test_collapse_two_ranks.py).
    ("distributed/test_failures.py", r"killed_within_a_save|sigterm_to_the_command|sigterm_to_another_rank"),
    ("distributed/test_failures.py", r"killed_in_a_rollout.*\[1-1\]|waits_for_no_other|stops_one_rank"),
    ("distributed/test_disks.py", r"\[(ddp|zero1|zero2|fsdp2)\]"),
    # test_timed.py and test_stall_watchdog.py stay, and a rank that is killed
    ("distributed/test_failures.py", r"never_returns_on_one_rank|reward_that_fails_on_one_rank"),
    # Two ranks: every strategy is met in test_invariance.py, with those optimizers that it may treat in a way of its
    # own; the sharded ones in test_sharded.py too, which resumes under ZeRO-3.
    (
        "distributed/test_invariance.py",
        r"\[ddp-(adamw|clipped|updates)|\[fsdp2-(clipped|budget)|\[zero1-(sgd|clipped|updates|budget)"
        r"|\[zero2-(sgd|adamw|updates)|\[zero3-adamw",
    ),
    (
        "distributed/test_resume.py",
        r"\[(zero1|zero2)(-|\])|number_of_processes_goes_on\[(zero3-2|fsdp2-1)|uninterrupted_one\[zero3",
    ),
    ("distributed/test_sharded.py", r"\[(fsdp2-layerwise|zero3)\]|one_rank_with_16|in_shards_and.*\[zero2\]"),
    (
        "distributed/test_export.py",
        r"parts_of_unequal_length|weights_of_the_run\[((ddp|zero1)-llama|(zero2|fsdp2|fsdp2_file)-opt)",
    ),
    ("distributed/test_vllm.py", r"\[(zero3|fsdp2)(\]|-)|write_ahead|any_rank_has_lost"),
    ("distributed/test_lora.py", r"\[(ddp|zero1|zero2|zero3)\]|fsdp2_resumes"),  # test_evaluation.py has ZeRO-3's
    ("distributed/test_reference_sync.py", r"\[(?!fsdp2-replicate)"),
    ("distributed/test_placements.py", r"\[(?!ddp-shard-k1|zero3-cpu-k1|part between)"),
    ("distributed/test_evaluation.py", r"\[(zero3|fsdp2|shared)\]"),
    ("test_auto_baseline.py", r"ranks_agree"),  # modules/test_two_ranks.py has the gathered scores
    ("modules/test_resume.py", r"that learns from training"),  # test_auto_baseline.py
    ("distributed/test_evaluation.py", r"lm_eval"),  # one rank: callbacks/test_lm_eval.py
    # Benchmarks and tables of the documentation: one whole benchmark stays, and the parts of the others.
    ("training/test_prompt_selection.py", r"two_ranks"),  # data/test_selection.py has ranks without processes
    (
        "test_benchmarks.py",
        r"lightning_alone|in_shards|step_measures|leaves_out_ppo|plan_is_held|picture_of_a_report|memory_does_not"
        r"|rollouts_of_a_server|steps_of_two_processes",
    ),
    ("benchmarks/test_baselines.py", r"run_in_pieces|gradients_of_a_task|seconds_of_steps"),
    ("benchmarks/test_chaos.py", r"every_kind"),  # what a trial does and how it is judged stays
    ("test_architecture.py", r"measure"),
    ("test_docs.py", r"builds_strictly|lead_nowhere"),  # `make docs` builds it, too
    (
        "tools/test_plan.py",
        r"the_table_|fit_into_it|divides_what_it_says\[(ddp|zero1|zero2-optimizer)",
    ),
    # Processes of a test's own: of those that say the same of another case, one stays.
    ("distributed/test_processes.py", r"leaves_behind|that_fails|never_joins|end_at_their_start"),
    ("training/test_preemption.py", r"reward_that_hangs\[(Python-fit|a library-validate)\]"),
    ("callbacks/test_export_policy.py", r"transformers_alone.*\[False\]"),
    ("test_cli_help.py", r"script_for_bash"),
    ("tools/test_doctor.py", r"the_demo_passes"),  # a healthy run stays
    ("strategies/test_stall_watchdog.py", r"the_stack\[searches|of_one_rank_ends_the_others"),
    ("test_cli.py", r"exported_policy_needs_transformers_alone"),
    (
        "rewards/test_timed.py",
        r"kill_reaches|class_of_the_users|never_returns.*\[(backtracks|computes)|show_the_response.*\[(crashes|leaves)",
    ),
    ("rewards/test_timed.py", r"on_the_last_token|check_of_prompts|too_long_is_found|check_of_rows.*\[(?!loop)"),
    ("rewards/test_timed.py", r"those_that_take_too_long\[(compute_score|ask)|without_a_child_left"),
    ("test_bad_input.py", r"command_itself_ends_with_code_2"),
    # Training to an end: the first task stays, and three stages of two steps each.
    ("modules/test_learning.py", r"in_other_variants|teaches_the_opposite"),
    ("test_stages.py", r"right_solutions_from_wrong"),
    # The command on a checkpoint that cannot be used: what reads it is the same for every subcommand.
    ("test_bad_input.py", r"runs_no_code\[.*-(validate|test|predict)\]"),
    # Mistakes as whole commands: the kinds that were no message stay.
    ("test_mistakes.py", r"one_message\[(?!a reward model as policy|an exception that is none|a negative one)"),
    # Lightning's own strategies load after the same look as that of a user's own.
    ("strategies/test_foreign_loading.py", r"lightnings_own"),
    # Servers of rollouts: one status stays, and one of the faults that log-probs find.
    (
        "rollout/test_vllm.py",
        r"another_temperature|asked_for_again\[429\]|find_what_checksums_would\[updated|corrected_responses\[None"
        r"|is_busy(?!.*/v1/models)|something_else(?!.*weight_info)|ends_its_requests\[(a server|Ctrl)"
        r"|few_tokens_at_once\[False|as_much_as_the_user_says|certificate_is_checked",
    ),
    (
        "rollout/test_vllm_ahead.py",
        r"resumes_bit_for_bit|run_asks_ahead|written_anew|evaluation_in_between|error_ahead",
    ),
    ("rollout/test_vllm_colocate.py", r"ends_with_the_trainer|is_started_again|leaves_neither"),
    # Families: one of each cache layout stays (plain, grouped queries, learned positions, sliding window).
    ("rollout/test_decode_attention.py", r"family_writes.*\[(?!Llama-|Mistral|BLOOM.*Shared)|whole_pages.*\[lengths2"),
    ("rollout/test_families.py", r"passes_every_check\[(?!Llama\]|Qwen2\]|OPT\]|Mistral)"),
    # CUDA graphs of families: each in one precision, and Llama in all.
    (
        "rollout/test_cuda_graph.py",
        r"graphs_write_what_the_model_writes\[(Qwen2|Gemma 2.*|OPT|GPT-NeoX|StableLM|Qwen2-MoE)-(float32|bfloat16)\]"
        r"|graphs_write_what_the_model_writes\[(Qwen3|Gemma 3.*|OPT \(.*|BLOOM.*|Mixtral)-(float32|mixed)\]"
        r"|graphs_write_what_the_model_writes\[(Mistral.*|Phi|GPT-2|Qwen3-MoE)-(bfloat16|mixed)\]",
    ),
    # Whole runs on the fake CUDA device: one in 32 and one in 16 bits stay.
    (
        "modules/test_on_cuda.py",
        r"^(?!test_remax_trains_as_on_a_cpu\[parked models\]|test_remax_trains_in_16_bits\[bf16-mixed\])",
    ),
    # Imports of every part in an interpreter of its own; those of the commands, the promise to a user, stay.
    ("test_layers.py", r"loads_nothing_heavy"),  # test_cli_help.py
    ("tools/test_report_browser.py", r"thousands_of_long_samples"),  # test_report.py has the samples that are kept
    ("tools/test_doctor_rewards.py", r"memory_of_their_host"),  # the limit of a container stays
    ("tools/test_doctor_policy.py", r"than_is_sampled\[.*(0\.1|top_p)|in_16_bits_only\[bf16-true"),
    # Whole commands and programs of the package, and the longest checks of the planner: parts are tested beside them.
    ("callbacks/test_collapse_real.py", r"healthy_run"),  # a run that is ruined stays
    ("distributed/test_failures.py", r"error_of_one_rank_alone"),
    ("distributed/test_resume.py", r"cannot_be_resumed_is_refused"),  # test_bad_input.py refuses another family
    ("rewards/test_timed.py", r"imports_from_the_path"),
    ("test_benchmarks.py", r"gpu_runs_its_whole_path"),
    ("test_fake_cuda.py", r"doctor_finds|device_that_is_there\[32"),
    ("tools/test_doctor.py", r"in_16_bits|data_that_cannot_be_read"),
    ("tools/test_export.py", r"memory_holds_one_copy"),
    ("tools/test_pipeline.py", ""),  # test_stages.py has its stages
    ("benchmarks/test_log_probs_memory.py", ""),  # test_benchmarks.py has a whole benchmark
    ("training/test_preemption.py", r"terminal_is_closed"),
    (
        "tools/test_plan.py",
        r"checkpointing_is_off|smaller_passes|shares_the_device|divides_what_it_says\[(zero2|fsdp2)"
        r"|any_precision\[32",
    ),
    # Two ranks: the strategies that share a path.
    ("distributed/test_evaluation.py", r"fsdp2_lora"),
    ("distributed/test_export.py", r"weights_of_the_run\[(zero1-opt|zero2-llama|zero3-opt|fsdp2_file-llama)"),
    ("distributed/test_invariance.py", r"\[zero3-(sgd|budget|clipped)"),
    ("distributed/test_resume.py", r"goes_on\[(zero3-1|fsdp2-2|ddp-2)|moments_of_ddp|no_frozen_model\[(ddp|fsdp2)"),
    ("distributed/test_sharded.py", r"exported_whole\[(fsdp2|zero2)\]"),
    # Resuming: where in a run its checkpoint lies, and what the state holds.
    ("data/test_prompts.py", r"resumes_where_it_stopped\[(2|6|8|12)-2"),
    ("data/test_sampler.py", r"within_an_epoch_is_exact\[(1|7)-.-2"),
    (
        "modules/test_resume.py",
        r"counted_in_epochs.*\[every (step|validation)|inside_an_epoch.*\[(every validation|as Lightning)"
        r"|three_are_six\[(at the end|two micro-batches|in the middle|a baseline)|state_is_needed\[(remax|callbacks)"
        r"|gradients_anew\[clipped",
    ),
    ("test_continue_run.py", r"is_the_same_run\[(none|csv and)|is_a_new_run\[(save_dir|version)"),
    ("test_run_folder.py", r"keep_all_that_they_wrote\[(csv|remote|tracking|without)"),
    # Gradients: losses and divisions that differ in one factor of what stays.
    (
        "modules/test_gradient.py",
        r"padding_leave_the_gradient\[(?!tokens|clipped_responses|whitened_clipped)|budget.*\[(?!two_samples)"
        r"|equals_the_oracle\[(tokens-False-False-1|clipped-False-False-4|responses-False-True-1)",
    ),
    ("modules/test_sft.py", r"leaves_the_step\[(?!4-2-True|1-8-False)"),
    ("training/test_reference.py", r"second_copy\[(?!True-full|False-k1)"),
    ("evaluation/test_eval_config.py", r"perplexity.*\[.*-(3|8)\]|its_own_responses\[(?!AutoEngine)"),
    ("evaluation/test_intervals.py", r"differences_hold_the_truth\[0\.9"),
    # Families and engines, as above.
    ("modules/test_reward_model.py", r"mean_0_and_variance_1\[(?!llama|opt|bert)"),
    ("rollout/test_families.py", r"passes_every_check\[Qwen2\]"),
    ("rollout/test_decode_attention.py", r"may_be_left\[RowLengths"),
    (
        "rollout/test_cuda_graph.py",
        r"^test_graphs_write.*\[(?!Llama-(float32|mixed)|Mistral|OPT-|Qwen2-MoE|Gemma 2)|keep_moving.*\[False"
        r"|copies_from_the_host.*\[(?!Falcon \(rotary\)-float32)|fails_once.*\[(?!error0-3)|inference_mode\[False"
        r"|leave_graphs_on\[(?!adapter and)|at_looks_only\[(True-True|False)",
    ),
    ("rollout/test_vllm_servers.py", r"behind_its_run\[(1|None)|gave_up.*\[abort|no_tokenizer_is_taken\[(400|500)"),
    ("training/test_on_policy.py", r"judged_by_how_likely.*\[SilentWide"),
    # Mistakes: each way in which one is told stays, with a few of its cases.
    (
        "test_bad_input.py",
        r"value_is_named\[(unknown key of (a|the data|the optimizer|the strategy|the trainer)|a class|an unknown choice"
        r"|missing reward|text for a number)|new_name\[False|said_of_a_value\[by (a group|the data, of|the trainer)"
        r"|exit_in_data.*\[row-(0|1-(sys|raise))|sys_exit.*\[(at once-0|in a constructor|in a callback-3)"
        r"|shows_the_prompt\[(nan_later|too_few)|are_finite\[(?!the optimizer|the command)",
    ),
    ("test_cli_shorthand.py", r"with_the_nearest\[change(\d|1[0-3]|1[6-9])-|taken_by_name\[(option-full|file)"),
    ("test_stages.py", r"with_one_message\[(?!longer|more than one|a head|equal sides|two shares)"),
    ("test_yaml_files.py", r"right_one\[--(?!lr|batch_size|modle)|before_it_is_read\[True|together\[(a|the (data|t))"),
    # Configurations: a recipe, the demo and the reward model stay, and an overlay of each folder.
    (
        "test_configs.py",
        r"with_tiny_models\[(?!opt1|demo\.|reward)|changes_what_it_says\[(?!base|gpus/8x|loggers/wandb|strategies/fsdp2"
        r"|presets/verl|overlays/debug)|preset_trains\[(?!presets/verl)|is_read\[validate",
    ),
    (
        "tools/test_doctor_rewards.py",
        r"is_not_there\[healthy|begins_and_ends\[\{|are_cut\[(33|256)|more_than_its_response\[(?!Dice)"
        r"|reach_the_reward_model\[conversation",
    ),
)


def is_exhaustive(path: str, name: str) -> bool:
    """Whether a test, by its path under `tests` and its name, only runs in `make test-all`."""
    return any(path == file and re.search(pattern, name) for file, pattern in EXHAUSTIVE)


def unmatched(collected: Iterable[tuple[str, str]]) -> list[str]:
    """The rows for files that were collected in which they match no test: renamed, or gone."""
    tests = list(collected)
    files = {path for path, _ in tests}
    return [
        f"{file} {pattern}"
        for file, pattern in EXHAUSTIVE
        if file in files and not any(path == file and re.search(pattern, name) for path, name in tests)
    ]


def without_representative(collected: Iterable[tuple[str, str]]) -> list[str]:
    """The files of which `make test` would run nothing at all, though their rows name tests."""
    tests = list(collected)
    left = {path for path, name in tests if not is_exhaustive(path, name)}
    whole = {file for file, pattern in EXHAUSTIVE if not pattern}
    return sorted({path for path, _ in tests} & {file for file, _ in EXHAUSTIVE} - left - whole)
