(preproc_include path: [(string_literal) (system_lib_string)] @include)

(translation_unit
  [(function_definition declarator: [(function_declarator declarator: (identifier) @define)
                                     (pointer_declarator (function_declarator declarator: (identifier) @define))])
   (struct_specifier name: (_) @define body: (_))
   (type_definition declarator: (type_identifier) @define)
   (preproc_function_def name: (_) @define)])

(function_definition body: (_) @body) @signature
(struct_specifier body: (_)) @signature
(enum_specifier body: (_)) @signature
(type_definition) @signature
(declaration declarator: [(function_declarator) (pointer_declarator (function_declarator))]) @signature
(preproc_function_def value: (_)? @body) @signature

[(compound_statement) (if_statement) (for_statement) (while_statement) (do_statement) (switch_statement)
 (return_statement) (expression_statement) (declaration) (function_definition) (type_definition)
 (case_statement) (else_clause) (argument_list) (field_declaration) (initializer_list)] @span
(init_declarator value: (_) @span)
(assignment_expression right: (_) @span)
