(preproc_include path: [(string_literal) (system_lib_string)] @include)
(namespace_definition name: (_) @package)

(translation_unit
  [(function_definition declarator: (function_declarator declarator: (identifier) @define))
   (class_specifier name: (type_identifier) @define body: (_))
   (struct_specifier name: (type_identifier) @define body: (_))
   (template_declaration (class_specifier name: (type_identifier) @define))
   (type_definition declarator: (type_identifier) @define)
   (alias_declaration name: (_) @define)])
(namespace_definition body: (declaration_list
  [(function_definition declarator: (function_declarator declarator: (identifier) @define))
   (class_specifier name: (type_identifier) @define body: (_))
   (struct_specifier name: (type_identifier) @define body: (_))
   (template_declaration (class_specifier name: (type_identifier) @define))
   (alias_declaration name: (_) @define)]))

(function_definition body: (_)? @body) @signature
(class_specifier body: (_) @members) @signature
(struct_specifier body: (_) @members) @signature
(enum_specifier body: (_)) @signature
(namespace_definition body: (_) @members) @signature
(type_definition) @signature
(alias_declaration) @signature
(declaration declarator: [(function_declarator) (pointer_declarator (function_declarator))
                          (reference_declarator (function_declarator))]) @signature
(field_declaration declarator: [(function_declarator) (pointer_declarator (function_declarator))
                                (reference_declarator (function_declarator))]) @signature
(preproc_function_def value: (_)? @body) @signature

[(compound_statement) (if_statement) (for_statement) (for_range_loop) (while_statement) (do_statement)
 (switch_statement) (try_statement) (return_statement) (throw_statement) (expression_statement) (declaration)
 (function_definition) (class_specifier) (template_declaration) (case_statement) (else_clause) (catch_clause)
 (argument_list) (field_declaration) (initializer_list) (lambda_expression)] @span
(init_declarator value: (_) @span)
(assignment_expression right: (_) @span)
