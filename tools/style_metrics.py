"""Prints the figures of style of a tree (default: this repository) for which STYLE sets targets."""
import ast
import itertools
import json
import statistics
import sys
from pathlib import Path

OLD_MODULES = """aliases arrivals cluster comment compare guard intake job journal optimize
proxy quality reference results session worker"""
# `.name` is a member of any class, `Class.name` of one, the rest are on the level of a module.
OLD_NAMES = """code_dir checkout packaged_dir workload_notebook digest give_way read_policy
read_token read_trigger_policy .fix Settings.storage Settings.shared Settings.results
.created_column .llm Settings.threshold .node_wait_s .freeze_layers .warm_start .watch_s
.max_waiting .deadline_s .evaluate_deadline_s .max_items .max_chars .data_roots .log_sample
.log_rows .log_seconds .log_files ServeConfig.shadow PromotionPolicy.min_rows .max_p99_ratio
.max_p50_ratio .windows_in_row .cool_down_hours .alert_again_hours .settle_seconds .confident
.extra_disagreement .false_refusals .on_refused_data .webhook_tries .enough .first_val_loss
.unlikeness EpochMetrics.rows EpochMetrics.seconds BatchResults.loc IngestResult.loc
IngestResult.state Results RESULTS Expectation Scores Overall BehaviorCase Mistake Candidate
GateCheck DriftTest Performance Distribution UnlikeRow Explanation BatchResults environment
worker_env free_ports locate durable seal damage connect_mlflow experiment_id who_asks begin_run
log_best best_run_id checkpoint_dir styled INK SHADES open_location read_labeled row_texts text_key
label_ids Tokens worker_batches pad_rows pad_batch table_digest measure Rule column_rule shape_rules
text_rules label_rules record_rules run_rules check write_docs ZONES pick_device pick_precision
bf16_in_hardware encoder_source model_inputs label_names predict_tokens max_tokens
settle_close_calls freeze_lower warm_start balanced_weights label_weights divide_logits FineTuning
.moving run_epochs best_epoch stopped_early num_steps train_loop first_sound calibrated Events
start_worker TrainJob.name make_job prepare_rows log_history open_run place make_trainer open_search
importance child_run scores per_class_scores bootstrap_f1 slice_rows read_behavior test_behavior
fit_baseline decide answers Predictor.proba predict_with aliases moving move_champion rollback_model
latencies measure_candidates gate log_classifier Rows see_rows word_rows own_rows make_reference
keep_reference reference_of trace_graph eager cut_by_length passes Guard Refused bears_token OPEN
under_way Journal Proxy complete_config await_version Versions .look .look_again Service .gather
.who .about Shadow read_allowed Answer Answers Table Wrong make_app Classifier loop_dir
shared_memory Arrival Arrivals Judge Yardstick check_rows judge_arrival champion_provenance
merged_rows merge_batches counts_test values_test more_often_test stability_index holm unlikeness
unusual_words begin_of last_rows logged_tests text_tests read_labels labeled_performance in_a_row
window_figures tell write_entry read_windows judge_all run_trigger watch read_run report_parts
gate_rows workloads_of run_alone cluster_of champion_figures verdict make_comment GitHub put_comment
main_results told_plainly"""
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)


def is_packed(node: ast.AST) -> bool:
    """Whether it is `a, b = x, y`, unless the right side uses names of the left, as a swap does."""
    if not (isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple)):
        return False
    left = node.targets[0]
    names, used = ({n.id for n in ast.walk(side) if isinstance(n, ast.Name)}
                   for side in (left, node.value))
    pairs = isinstance(left, ast.Tuple) and len(left.elts) == len(node.value.elts)
    return pairs and not names & used


def num_packed(tree: ast.Module) -> int:
    """Assignments of unrelated values in one statement, and statements behind a semicolon."""
    blocks = [getattr(node, part, None) for node in ast.walk(tree) for part in ("body", "orelse")]
    joined = sum(a.end_lineno == b.lineno for block in blocks if isinstance(block, list)
                 for a, b in itertools.pairwise(block))
    return joined + sum(map(is_packed, ast.walk(tree)))


def definitions(tree: ast.Module) -> list[tuple[str, ast.AST]]:
    """Names that a cell defines on its level and, as `Class.name`, in its classes."""
    found = []
    classes = [(f"{node.name}.", node.body) for node in tree.body if isinstance(node, ast.ClassDef)]
    for owner, body in [("", tree.body), *classes]:
        for node in body:
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            names = [t.id for t in targets if isinstance(t, ast.Name)] + [getattr(node, "name", "")]
            found += [(owner + name, node) for name in names if name]
    return found


def is_comment(cell: str, tree: ast.Module) -> list[bool]:
    """For each line of a cell whether it is a parameter with a comment."""
    heads = {number for node in ast.walk(tree) if isinstance(node, FUNCTION)
             for number in range(node.lineno, node.body[0].lineno)}
    return [number in heads and " # " in line for number, line in enumerate(cell.splitlines(), 1)]


def main(root: Path) -> None:
    """Prints the figures."""
    paths = sorted((root / "nbs").glob("[0-9]*.ipynb"))
    notebooks = {path.stem: json.loads(path.read_text(encoding="utf-8"))["cells"] for path in paths}
    sources = ["".join(cell["source"]) for found in notebooks.values() for cell in found]
    cells = ["\n".join(line for line in source.splitlines() if not line.startswith("#|")).strip()
             for source in sources if source.startswith("#| export")]
    trees = [ast.parse(cell) for cell in cells]
    every = [len(line) > 100 for cell in cells for line in cell.splitlines()]
    comment = itertools.chain.from_iterable(map(is_comment, cells, trees))
    code = [long for long, is_one in zip(every, comment, strict=True) if not is_one]
    lengths = [len(cell.splitlines()) for cell in cells]
    defined = dict(item for tree in trees for item in definitions(tree))
    public = {name: [arg.arg for arg in ast.iter_child_nodes(node.args) if isinstance(arg, ast.arg)]
              for name, node in defined.items() if isinstance(node, FUNCTION) and name[0] != "_"}
    most = sorted((len(set(names) - {"self"}), name) for name, names in public.items())[:-4:-1]
    old = set(OLD_NAMES.split())
    left = {name for name in defined if {name, name[name.find("."):]} & old}
    left |= {stem for stem in notebooks if stem[3:] in OLD_MODULES.split()}
    silent = [stem for stem, found in notebooks.items() if not any(c.get("outputs") for c in found)]
    helpers = [path for path in (root / "tests").rglob("*.py") if path.name[:5] != "test_"]
    tools, tests = (sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)
                    for paths in ((root / "tools").glob("*.py"), helpers))
    print(f"""lines of exported code: {len(every)}
over 100 characters: {sum(code) / len(code):.1%}
over 100 characters, with commented parameters: {sum(every) / len(every):.1%}
packed assignments per 1,000 lines: {sum(map(num_packed, trees)) / len(every) * 1000:.1f}
exported cells: {len(cells)}
their lines in the median: {statistics.median(lengths):.0f}, longest: {max(lengths)}
their lines at the 90th percentile: {statistics.quantiles(lengths, n=10)[-1]:.0f}
most parameters of public functions: {", ".join(f"{number} {name}" for number, name in most)}
stage notebooks without an output: {len(silent)} {" ".join(silent)}
old public names left: {len(left)} {" ".join(sorted(left))}
lines of tools/*.py: {tools}, of test helpers: {tests}""")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1])
