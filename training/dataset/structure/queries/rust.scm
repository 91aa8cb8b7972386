(mod_item name: (identifier) @mod !body)
(use_declaration argument: (_) @use)

(source_file [(function_item name: (_) @define) (struct_item name: (_) @define) (enum_item name: (_) @define)
              (union_item name: (_) @define) (trait_item name: (_) @define) (type_item name: (_) @define)
              (const_item name: (_) @define) (static_item name: (_) @define)
              (macro_definition name: (_) @define)])

(function_item body: (_) @body) @signature
(function_signature_item) @signature
(struct_item) @signature
(enum_item) @signature
(trait_item body: (_) @members) @signature
(impl_item body: (_) @members) @signature
(mod_item body: (_) @members) @signature
(type_item) @signature
(macro_definition name: (_) . "(" @body) @signature
(macro_definition name: (_) . "{" @body) @signature

[(block) (let_declaration) (expression_statement) (if_expression) (match_expression) (for_expression)
 (while_expression) (loop_expression) (match_arm) (else_clause) (function_item) (struct_item) (enum_item)
 (impl_item) (trait_item) (const_item) (static_item) (use_declaration) (arguments) (closure_expression)
 (macro_invocation) (return_expression) (field_initializer_list)] @span
(let_declaration value: (_) @span)
(assignment_expression right: (_) @span)
