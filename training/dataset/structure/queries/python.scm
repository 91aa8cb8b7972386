; Imports. A relative module keeps its dots; the names follow one match each.
(import_statement name: (dotted_name) @import)
(import_statement name: (aliased_import name: (dotted_name) @import))
(import_from_statement module_name: (_) @import
  [name: (dotted_name) @name  name: (aliased_import name: (dotted_name) @name)  (wildcard_import) @name])

; Top-level names.
(module [(function_definition name: (identifier) @define)
         (class_definition name: (identifier) @define)
         (decorated_definition definition: (_ name: (identifier) @define))
         (expression_statement (assignment left: (identifier) @define))])

; What a skeleton shows: heads, the members of classes, first lines of docstrings.
(function_definition body: (block) @body) @signature
(function_definition body: (block . (expression_statement (string (string_content) @docstring))) @body) @signature
(class_definition body: (block) @members) @signature
(class_definition body: (block . (expression_statement (string (string_content) @docstring))) @members) @signature

; Whole nodes.
[(block) (if_statement) (for_statement) (while_statement) (with_statement) (try_statement) (match_statement)
 (function_definition) (class_definition) (decorated_definition) (return_statement) (expression_statement)
 (print_statement) (exec_statement) (raise_statement) (assert_statement) (delete_statement) (import_statement) (import_from_statement)
 (else_clause) (elif_clause) (except_clause) (finally_clause) (case_clause) (argument_list)] @span
(assignment right: (_) @span)
