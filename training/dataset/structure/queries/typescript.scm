(import_statement source: (string) @import)
(import_statement (import_require_clause source: (string) @require))
(export_statement source: (string) @import)
(call_expression function: (import) arguments: (arguments . (string) @import))
(call_expression function: (identifier) @_function arguments: (arguments . (string) @require)
  (#eq? @_function "require"))

(program [(_ name: [(identifier) (type_identifier)] @define)
          (lexical_declaration (variable_declarator name: (identifier) @define))
          (export_statement declaration: [(_ name: [(identifier) (type_identifier)] @define)
                                          (lexical_declaration
                                            (variable_declarator name: (identifier) @define))])])

(function_declaration body: (_) @body) @signature
(generator_function_declaration body: (_) @body) @signature
(function_signature) @signature
(class_declaration body: (_) @members) @signature
(abstract_class_declaration body: (_) @members) @signature
(method_definition body: (_) @body) @signature
(abstract_method_signature) @signature
(interface_declaration) @signature
(type_alias_declaration) @signature
(enum_declaration body: (_) @body) @signature
(internal_module body: (_) @members) @signature
(lexical_declaration (variable_declarator value: [(arrow_function body: (_) @body)
                                                  (function_expression body: (_) @body)])) @signature

[(statement_block) (if_statement) (for_statement) (for_in_statement) (while_statement) (do_statement)
 (try_statement) (switch_statement) (return_statement) (throw_statement) (expression_statement)
 (lexical_declaration) (variable_declaration) (function_declaration) (class_declaration) (method_definition)
 (interface_declaration) (type_alias_declaration) (else_clause) (catch_clause) (finally_clause) (switch_case)
 (arguments) (import_statement)] @span
(variable_declarator value: (_) @span)
(assignment_expression right: (_) @span)
