(import_statement source: (string) @import)
(export_statement source: (string) @import)
(call_expression function: (import) arguments: (arguments . (string) @import))
(call_expression function: (identifier) @_function arguments: (arguments . (string) @require)
  (#eq? @_function "require"))

(program [(function_declaration name: (_) @define)
          (generator_function_declaration name: (_) @define)
          (class_declaration name: (_) @define)
          (lexical_declaration (variable_declarator name: (identifier) @define))
          (export_statement declaration: [(function_declaration name: (_) @define)
                                          (generator_function_declaration name: (_) @define)
                                          (class_declaration name: (_) @define)
                                          (lexical_declaration (variable_declarator name: (identifier) @define))])])

(function_declaration body: (_) @body) @signature
(generator_function_declaration body: (_) @body) @signature
(class_declaration body: (_) @members) @signature
(method_definition body: (_) @body) @signature
(lexical_declaration (variable_declarator value: [(arrow_function body: (_) @body)
                                                  (function_expression body: (_) @body)])) @signature

[(statement_block) (if_statement) (for_statement) (for_in_statement) (while_statement) (do_statement)
 (try_statement) (switch_statement) (return_statement) (throw_statement) (expression_statement)
 (lexical_declaration) (variable_declaration) (function_declaration) (class_declaration) (method_definition)
 (else_clause) (catch_clause) (finally_clause) (switch_case) (arguments) (import_statement)
 (jsx_element)] @span
(variable_declarator value: (_) @span)
(assignment_expression right: (_) @span)
