"""A task of the LM evaluation harness: format it with its name and its file of documents."""

TASK = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: ["on the mat", "zzz qqq"]
doc_to_target: 0
metric_list:
  - metric: acc
"""
