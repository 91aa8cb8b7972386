(command name: (command_name (word) @_function) . argument: [(word) (string) (concatenation)] @source
  (#any-of? @_function "source" "."))

(program (function_definition name: (_) @define))

(function_definition body: (_) @body) @signature

[(if_statement) (for_statement) (c_style_for_statement) (while_statement) (case_statement)
 (function_definition) (compound_statement) (subshell) (pipeline) (list) (command) (declaration_command)
 (variable_assignment) (redirected_statement) (else_clause) (elif_clause) (case_item) (do_group)] @span
(variable_assignment value: (_) @span)
