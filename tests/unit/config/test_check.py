"""The rules between settings: each broken one by its message, and the layouts and commands that must pass."""

import typing

import pytest

from megatron_scope.config import check
from megatron_scope.config.check import check_config
from megatron_scope.config.load import COMMAND_LINE, _apply_override, parse_config
from megatron_scope.config.schema import Config
from megatron_scope.errors import ConfigError

TRAIN = (
    "run.output_dir=runs/x",
    "student.hf=models/student",
    "teacher.hf=models/teacher",
    "data.train=train.jsonl",
    "rollout.servers=http://localhost:30000",
)


def build(*overrides):
    mapping = {}
    for override in overrides:
        _apply_override(mapping, override, COMMAND_LINE)
    return parse_config(mapping, "test")


def message(*overrides, **options):
    with pytest.raises(ConfigError) as caught:
        check_config(build(*TRAIN, *overrides), **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_complete_config_passes():
    check_config(build(*TRAIN))
    check_config(build(*TRAIN), world_size=8)
    check_config(build(*TRAIN), command="evaluate")


def test_a_server_is_launched_without_what_a_run_needs_but_within_the_ranges():
    check_config(build("teacher.hf=models/teacher"), command="launch")
    assert "data.max_prompt_tokens is 0" in message("data.max_prompt_tokens=0", command="launch")


@pytest.mark.parametrize(
    ("overrides", "options"),
    [
        (["parallel.sequence=true"], {}),
        (["objective.divergence=forward_kl", "objective.name=opd"], {}),
        (["student.megatron=m", "teacher.megatron=m"], {}),
        (["student.hf=null", "student.megatron=m", "teacher.hf=null", "teacher.megatron=m"], {}),
        (["parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true"], {"world_size": 8}),
        (["parallel.tensor=2", "parallel.pipeline=2", "parallel.expert=4"], {"world_size": 8}),
        (["parallel.pipeline=2", "student.pipeline_layers=[0,3]", "teacher.pipeline_layers=[2,1]"], {}),
        (["rollout.engine=replay", "rollout.file=r.jsonl", "data.train=null", "rollout.servers=[]"], {}),
        (["rollout.engine=replay", "rollout.file=r.jsonl", "rollout.samples_per_prompt=1"], {}),
        (["rollout.engine=embedded", "rollout.servers=[]"], {}),
        (["objective.name=sft", "teacher.hf=null", "rollout.servers=[]", "rollout.samples_per_prompt=1"], {}),
        (["objective.name=kd", "teacher.hf=null", "rollout.servers=[]"], {}),
        (["objective.name=opd", "rollout.samples_per_prompt=1"], {}),
        (["objective.name=grpo", "teacher.hf=null"], {}),
        (["objective.name=grpo", "objective.ratio_clip=.inf", "objective.kl_coefficient=0"], {}),
        (["objective.preset=official"], {}),
        (["teacher.server=[http://t:1, http://t:2]"], {}),
        (["teacher.server=http://t:1", "teacher.hf=null", "objective.name=opd"], {}),
        (["teacher.server=http://t:1", "teacher.hf=null", "teacher.stop_token_id=3"], {}),
        (["teacher.server=http://localhost:30000", "objective.name=grpo"], {}),
        (["teacher.server=http://localhost:30000", "rollout.engine=embedded"], {}),
        (["train.updates_per_batch=4", "objective.ratio_clip=0.2"], {}),
        (["rollout.correction=truncated_importance", "rollout.correction_cap=1"], {}),
        (["rollout.correction=truncated_importance", "objective.divergence=jsd"], {}),
        (["rollout.logprob_gap_limit=0.01", "objective.name=opd", "objective.divergence=jsd"], {}),
        (["data.prompt_template=\\boxed{} {x} {prompt}"], {}),
        (["data.system_prompt=Reason.", "data.chat_template_kwargs.enable_thinking=true"], {}),
        (
            ["checkpoint.every=0", "optimizer.clip_grad=0", "optimizer.weight_decay=0", "optimizer.beta1=0"],
            {},
        ),
        (["objective.student_exponent=0", "objective.teacher_exponent=1", "objective.tau=0.5"], {}),
        (["optimizer.warmup_steps=200"], {}),
        (["rollout.servers=[]", "rollout.servers_file=servers.txt"], {}),
        (["rollout.router=http://r:1"], {}),
        (["sync.transport=broadcast", "sync.master_port=65535"], {}),
        (["teacher.hf=null", "run.output_dir=null", "data.train=null"], {"command": "evaluate"}),
    ],
)
def test_what_must_be_accepted(overrides, options):
    check_config(build(*TRAIN, *overrides), **options)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("run.steps=0", "run.steps is 0: it must be 1 or more"),
        ("parallel.tensor=-2", "parallel.tensor is -2: it must be 1 or more"),
        ("data.max_prompt_tokens=0", "data.max_prompt_tokens is 0: it must be 1 or more"),
        ("rollout.health_interval_s=0", "rollout.health_interval_s is 0.0: it must be finite and above 0"),
        ("rollout.health_timeout_s=.inf", "rollout.health_timeout_s is inf: it must be finite and above 0"),
        ("rollout.max_new_tokens=0", "rollout.max_new_tokens is 0: it must be 1 or more"),
        ("evaluate.max_new_tokens=0", "evaluate.max_new_tokens is 0: it must be 1 or more"),
        ("train.micro_batch_tokens=0", "train.micro_batch_tokens is 0: it must be 1 or more"),
        ("teacher.request_tokens=0", "teacher.request_tokens is 0: it must be 1 or more"),
        ("teacher.max_concurrent_requests=0", "teacher.max_concurrent_requests is 0: it must be 1 or more"),
        ("teacher.start_timeout_s=0", "teacher.start_timeout_s is 0.0: it must be finite and above 0"),
        ("teacher.request_timeout_s=-1", "teacher.request_timeout_s is -1.0: it must be finite and above 0"),
        ("teacher.canary_tolerance=-1", "teacher.canary_tolerance is -1.0: it must be finite and 0 or more"),
        ("run.seed=-1", "run.seed is -1: it must be 0 or more"),
        ("checkpoint.every=-1", "checkpoint.every is -1: it must be 0 or more"),
        ("objective.tau=0", "objective.tau is 0.0: it must be finite and above 0"),
        ("objective.tau=.nan", "objective.tau is nan: it must be finite and above 0"),
        ("objective.tau=.inf", "objective.tau is inf: it must be finite and above 0"),
        ("rollout.temperature=0", "rollout.temperature is 0.0: it must be finite and above 0"),
        ("objective.student_temperature=-1", "objective.student_temperature is -1.0: it must be finite and"),
        ("optimizer.lr=0", "optimizer.lr is 0.0: it must be finite and above 0"),
        ("optimizer.lr=.inf", "optimizer.lr is inf: it must be finite and above 0"),
        ("optimizer.weight_decay=-0.1", "optimizer.weight_decay is -0.1: it must be finite and 0 or more"),
        ("objective.teacher_exponent=.nan", "objective.teacher_exponent is nan: it must be finite"),
        ("rollout.top_p=0", "rollout.top_p is 0.0: it must be above 0 and at most 1 (1 turns it off)"),
        ("evaluate.diversity_responses=1", "evaluate.diversity_responses is 1: it must be 2 or more"),
        ("evaluate.top_p=1.5", "evaluate.top_p is 1.5: it must be above 0 and at most 1"),
        ("rollout.correction_cap=0.5", "rollout.correction_cap is 0.5: it must be finite and 1 or more"),
        ("rollout.correction_cap=.inf", "rollout.correction_cap is inf: it must be finite and 1 or more"),
        ("rollout.top_k=0", "rollout.top_k is 0: it must be 1 or more, or -1 to turn it off"),
        ("optimizer.beta2=1", "optimizer.beta2 is 1.0: it must be at least 0 and below 1"),
        ("sync.bucket_mb=0", "sync.bucket_mb is 0.0: it must be finite and above 0"),
        ("sync.master_port=-1", "sync.master_port is -1: it must be from 0 to 65535 (0 takes a free one)"),
        ("sync.master_port=65536", "sync.master_port is 65536: it must be from 0 to 65535"),
        ("data.stop_token_ids=[1,-2]", "data.stop_token_ids has -2: token ids are 0 or more"),
    ],
)
def test_values_out_of_range_are_refused(override, said):
    assert said in message(override)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["parallel.context=2"],
            "parallel.context is 2: it needs Transformer Engine's attention, which is not supported yet; "
            "set parallel.context=1",
        ),
        (
            ["parallel.pipeline=2", "student.pipeline_layers=[4]"],
            "student.pipeline_layers is [4]: it must have 2 entries, one for each pipeline stage",
        ),
        (["teacher.pipeline_layers=[-1]"], "teacher.pipeline_layers is [-1]: each entry must be 0 or more"),
        (
            ["teacher.pipeline_layers=[0]"],
            "teacher.pipeline_layers is [0]: each entry must be 0 or more, and one",
        ),
        (
            ["data.prompt_template=Solve:"],
            "data.prompt_template has 0 {prompt} fields: it must have exactly one",
        ),
        (["data.prompt_template={prompt} {prompt}"], "data.prompt_template has 2 {prompt} fields"),
        (
            ["data.prompt_template={prompt}", "data.system_prompt=Reason."],
            "data.system_prompt and data.prompt_template are both set",
        ),
        (
            ["data.prompt_template={prompt}", "data.chat_template_kwargs.a=1"],
            "data.chat_template_kwargs and data.prompt_template are both set",
        ),
        (
            ["optimizer.schedule=cosine", "optimizer.min_lr=1"],
            "optimizer.min_lr is 1.0: a cosine schedule ends there, so it must be at most optimizer.lr=5e-05",
        ),
        (
            ["rollout.samples_per_prompt=1"],
            "rollout.samples_per_prompt is 1: SCOPE weights need a group; use 4 or more (the paper takes 8), "
            "or objective.name=opd",
        ),
        (
            ["rollout.samples_per_prompt=1", "objective.name=grpo"],
            "rollout.samples_per_prompt is 1: GRPO's advantages need a group; use 4 or more",
        ),
        (
            ["objective.preset=official", "objective.name=opd"],
            "objective.preset is official with objective.name=opd: it is the authors' variant of SCOPE",
        ),
        (
            ["objective.kl_coefficient=1e-4"],
            "objective.kl_coefficient is 0.0001 with objective.name=scope: only grpo has a term",
        ),
        (
            ["objective.ratio_clip=0"],
            "objective.ratio_clip is 0.0: it must be above 0; null turns clipping off",
        ),
        (["objective.ratio_clip=.nan"], "objective.ratio_clip is nan: it must be above 0"),
        (
            ["objective.name=kd", "objective.ratio_clip=0.2"],
            "objective.ratio_clip is 0.2 with objective.name=kd, which has no ratio; set",
        ),
        (
            ["rollout.logprob_gap_limit=0"],
            "rollout.logprob_gap_limit is 0.0: it must be above 0; null sets no limit",
        ),
        (["rollout.logprob_gap_limit=.nan"], "rollout.logprob_gap_limit is nan: it must be above 0"),
        (
            ["rollout.logprob_gap_limit=0.1", "objective.name=sft"],
            "rollout.logprob_gap_limit is 0.1 with objective.name=sft, whose responses no engine drew; set "
            "rollout.logprob_gap_limit=null",
        ),
        (
            ["rollout.correction=truncated_importance", "objective.name=kd"],
            "rollout.correction is truncated_importance with objective.name=kd, whose responses no engine "
            "drew; set rollout.correction=none",
        ),
        (
            [
                "rollout.correction=truncated_importance",
                "objective.name=opd",
                "objective.divergence=reverse_kl",
            ],
            "rollout.correction is truncated_importance with objective.name=opd and objective.divergence="
            "reverse_kl, which does not depend on the token drawn",
        ),
        (
            ["train.updates_per_batch=4", "rollout.prompts_per_step=3"],
            "train.updates_per_batch is 4 but rollout.prompts_per_step=3: each update needs a prompt; lower",
        ),
        (
            ["objective.divergence=jsd", "objective.name=grpo"],
            "objective.divergence is jsd with objective.name=grpo, which has no teacher; set",
        ),
        (
            ["objective.divergence=reverse_kl", "teacher.stop_token_id=3"],
            "teacher.stop_token_id is 3 with objective.divergence=reverse_kl, which compares whole",
        ),
        (["teacher.stop_token_id=-1"], "teacher.stop_token_id is -1: token ids are 0 or more"),
        (
            ["run.output_dir=null"],
            "run.output_dir is not set: the run needs a folder; set run.output_dir=runs/NAME",
        ),
        (
            ["student.hf=null"],
            "student.hf is not set: there is nothing to train; set student.hf to a Hugging Face",
        ),
        (
            ["teacher.hf=null"],
            "teacher.hf is not set: the teacher scores incorrect responses; set teacher.hf",
        ),
        (
            ["data.train=null"],
            "data.train is not set: set data.train to a JSON-lines file of {id, prompt, answer",
        ),
        (
            ["data.train=null", "objective.name=sft"],
            "data.train is not set: set data.train to a JSON-lines file of {prompt, response} rows",
        ),
        (
            ["rollout.servers=[]"],
            "rollout.servers is empty: rollout.engine=sglang needs the servers' URLs; "
            "set rollout.servers=[http://HOST:30000] or rollout.servers_file, or rollout.engine=embedded",
        ),
        (
            ["rollout.servers_file=servers.txt"],
            "rollout.servers_file is servers.txt and rollout.servers is set too: the servers are those of "
            "one of them; set rollout.servers=[] or rollout.servers_file=null",
        ),
        (
            ["rollout.router=localhost:1"],
            "rollout.router has 'localhost:1': it must be a URL, as in http://HOST:30000",
        ),
        (
            ["rollout.servers=localhost:1"],
            "rollout.servers has 'localhost:1': it must be a URL, as in http://HOST",
        ),
        (
            ["rollout.servers=[http://a, http://a]"],
            "rollout.servers and rollout.router name a server twice; list each one once, and the router only "
            "as rollout.router",
        ),
        (
            ["rollout.servers=[http://a, http://b]", "rollout.router=http://b/"],
            "rollout.servers and rollout.router name a server twice",
        ),
        (["rollout.engine=replay"], "rollout.file is not set: rollout.engine=replay reads it"),
        (
            ["teacher.hf=null"],
            "teacher.hf is not set: the teacher scores incorrect responses; set teacher.hf to a Hugging Face "
            "model folder, teacher.megatron to a checkpoint, or teacher.server to the URLs of SGLang servers",
        ),
        (["teacher.server=[]", "teacher.hf=null"], "teacher.hf is not set"),
        (["teacher.server=t:1"], "teacher.server has 't:1': it must be a URL, as in http://HOST:30000"),
        (["teacher.server=[http://t, http://t]"], "teacher.server names a server twice; list each one once"),
        (
            ["teacher.server=http://t:1", "objective.divergence=reverse_kl"],
            "objective.divergence is reverse_kl with teacher.server: an exact divergence needs the "
            "teacher's hidden states, which a server does not give; set objective.divergence=sampled, or "
            "give the teacher as teacher.hf or teacher.megatron instead",
        ),
        (
            ["teacher.server=http://t:1", "objective.teacher_temperature=0.7"],
            "objective.teacher_temperature is 0.7 with teacher.server: a server scores at temperature 1; set "
            "objective.teacher_temperature=1",
        ),
        (
            ["teacher.server=http://t:1", "teacher.megatron=m"],
            "teacher.server and teacher.megatron are both set: a served teacher needs no checkpoint; "
            "remove one",
        ),
        (
            ["teacher.server=http://t:1", "teacher.pipeline_layers=[2]"],
            "teacher.pipeline_layers is [2] with teacher.server: a served teacher has no layers on the "
            "ranks; set teacher.pipeline_layers=null",
        ),
        (
            ["teacher.server=[http://t:1, http://localhost:30000]"],
            "http://localhost:30000 is in both teacher.server and rollout.servers or rollout.router: the "
            "student's weights are loaded into the latter; serve the teacher on servers of its own",
        ),
        (
            ["teacher.server=http://t:1", "rollout.router=http://t:1/"],
            "http://t:1 is in both teacher.server and rollout.servers or rollout.router",
        ),
        (
            [
                "rollout.overlap_scoring=true",
                "objective.divergence=reverse_kl",
                "teacher.hidden_states_overflow=recompute",
            ],
            "rollout.overlap_scoring is true with teacher.hidden_states_overflow=recompute, which is decided "
            "for a step as a whole; set teacher.hidden_states_overflow=file, or rollout.overlap_scoring=null",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(overrides, said):
    assert said in message(*overrides)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["student.hf=null"], "student.hf is not set: there is nothing to evaluate"),
        (
            ["student.megatron=m"],
            "student.megatron is m: an evaluation serves a Hugging Face folder; write one with "
            "megatron-scope convert to-hf, and give it with --model",
        ),
        (["rollout.engine=replay"], "rollout.engine is replay: an evaluation draws new responses"),
        (["rollout.servers=[]"], "rollout.servers is empty"),
    ],
)
def test_what_an_evaluation_needs(overrides, said):
    assert said in message(*overrides, command="evaluate")


@pytest.mark.parametrize(("world_size", "above"), [(6, 8), (1, 4), (5, 8)])
def test_a_world_size_that_the_layout_does_not_divide_is_refused(world_size, above):
    assert message("parallel.tensor=2", "parallel.pipeline=2", world_size=world_size) == (
        f"there are {world_size} ranks: parallel.tensor=2 x parallel.pipeline=2 needs a multiple of 4; "
        f"start {above} ranks or change parallel.tensor and parallel.pipeline"
    )


@pytest.mark.parametrize(("expert", "world_size", "ranks"), [(2, 2, 1), (3, 8, 4), (8, 8, 4)])
def test_experts_are_spread_over_the_ranks_of_a_pipeline_stage(expert, world_size, ranks):
    assert message("parallel.pipeline=2", f"parallel.expert={expert}", world_size=world_size) == (
        f"parallel.expert is {expert}: it must divide the {ranks} ranks of a pipeline stage ({world_size} / "
        "parallel.pipeline=2); use a smaller one or start more ranks"
    )


def test_every_numeric_setting_has_a_range():
    ranged = {
        name
        for table in (
            "POSITIVE_COUNTS",
            "COUNTS",
            "GROUPS",
            "CAPS",
            "POSITIVE",
            "NOT_NEGATIVE",
            "FINITE",
            "TOP_P",
            "TOP_K",
            "BETAS",
            "PORTS",
        )
        for name in getattr(check, f"_{table}")
    }
    numeric = {
        f"{section}.{field}"
        for section, kind in typing.get_type_hints(Config).items()
        for field, annotation in typing.get_type_hints(kind).items()
        if annotation in (int, float)
    }
    assert ranged == numeric
